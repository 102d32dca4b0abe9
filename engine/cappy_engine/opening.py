"""From what was asked for to sessions: device, precision, threads, mode. What cannot be delivered is an error.

Nothing falls back: what is asked for by name is what runs; what "auto" chose stands in `ScorerInfo`, with the reason.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cappy_engine.batching import Padding
from cappy_engine.bundle import PRECISIONS, Bundle
from cappy_engine.errors import CappyError, DeviceUnavailable
from cappy_engine.execution import MODES, Execution, choose_execution, read_tuned, tuned_folder, tuned_key
from cappy_engine.machine import cpu_name, usable_cores
from cappy_engine.session import DEVICES, LazySession, Session, load_runtime, open_session

AUTO_PRECISIONS = {"cpu": ("fp32", "int8", "fp16"), "cuda": ("fp32", "fp16"), "tensorrt": ("fp32", "fp16")}
"""What precision="auto" takes, first found first, and what a device runs at all. Exact scores come before fast ones:
int8 changes scores by more than rounding and must be asked for; fp16 is slow on a CPU, and not measured on CUDA."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorerInfo:
    """What was chosen, and why; `padding` is what becomes of it (batching.Padding)."""

    bundle: str
    device: str
    device_reason: str
    precision: str
    precision_reason: str
    threads: int
    mode: str
    mode_reason: str
    padding: Padding
    max_batch_tokens: int
    max_length: int


@dataclass(frozen=True)
class Opened:
    """The session for a batch alone, the one for several at a time where the mode has one, and what was chosen."""

    session: Session
    narrow_session: Session | None
    info: ScorerInfo


def open_for_scoring(
    bundle: Bundle,
    *,
    device: str,
    precision: str,
    threads: int | None,
    mode: str,
    max_batch_tokens: int | None,
    name: str,
) -> Opened:
    """Open what `Scorer.open` asks for, with its options and errors; `name` is the bundle's in the info."""
    check_options(device, precision, mode, threads, max_batch_tokens)
    cores = usable_cores() if threads is None else threads
    device, device_reason, precision, precision_reason = _choose_device(bundle, device, precision, cores)
    execution = choose_execution(
        mode,
        device=device,
        threads=cores,
        model_bytes=sum(bundle.manifest.files[file].size_bytes for file in bundle.model_files(precision)),
        tuned=read_tuned(tuned_folder(), tuned_key(tuning_facts(bundle, precision, cores))),
        max_batch_tokens=max_batch_tokens,
    )
    if precision in bundle.manifest.batch_dependent:
        log.warning("int8 of %s has one scale for a whole batch, so pairs run one by one; export it again", name)
        execution = dataclasses.replace(execution, max_batch_tokens=1)
    session, narrow_session = _open_sessions(bundle, precision, device, cores, execution)
    info = ScorerInfo(
        bundle=name,
        device=device,
        device_reason=device_reason,
        precision=precision,
        precision_reason=precision_reason,
        threads=cores,
        mode=execution.mode,
        mode_reason=execution.reason,
        padding=choose_padding(device, is_unpadded=precision in bundle.manifest.unpadded),
        max_batch_tokens=execution.max_batch_tokens,
        max_length=bundle.manifest.max_length,
    )
    return Opened(session, narrow_session, info)


def choose_precision(asked: str, device: str, available: Sequence[str]) -> tuple[str, str]:
    """The precision to run, and why: `asked`, or for "auto" the first of AUTO_PRECISIONS that is available.

    Raises DeviceUnavailable if the device does not run that precision.
    """
    order = AUTO_PRECISIONS[device]
    found = asked if asked != "auto" else next((name for name in order if name in available), available[0])
    if found not in order:
        raise DeviceUnavailable(f"{found} runs on the CPU only: most of its operators have no {device} version")
    return found, "asked for" if asked != "auto" else f"auto: the first of {', '.join(order)} in the bundle"


def choose_padding(device: str, *, is_unpadded: bool) -> Padding:
    """What becomes of padding: the graph removes it, or the CPU's batches avoid it, or a GPU's allow it."""
    if is_unpadded:
        return "removed"
    return "avoided" if device == "cpu" else "allowed"


def tuning_facts(bundle: Bundle, precision: str, threads: int) -> dict[str, object]:
    """All that the best mode and batch size depend on: processor, threads, ONNX Runtime, and the model's digests."""
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "onnxruntime": str(load_runtime().__version__),
        "model": [bundle.manifest.files[name].sha256 for name in bundle.model_files(precision)],
    }


def check_options(device: str, precision: str, mode: str, threads: int | None, max_batch_tokens: int | None) -> None:
    """Raise ValueError, with the value and what may be chosen, for an option that no scorer has."""
    if device not in ("auto", *DEVICES):
        raise ValueError(f"unknown device {device!r}; choose from auto, {', '.join(DEVICES)}")
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"unknown precision {precision!r}; choose from auto, {', '.join(PRECISIONS)}")
    if mode not in ("auto", *MODES):
        raise ValueError(f"unknown mode {mode!r}; choose from auto, {', '.join(MODES)}")
    if threads is not None:
        check_positive(threads=threads)
    if max_batch_tokens is not None:
        check_positive(max_batch_tokens=max_batch_tokens)


def check_positive(**options: int) -> None:
    """Raise ValueError for an option below 1, by its name."""
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _choose_device(bundle: Bundle, device: str, precision: str, threads: int) -> tuple[str, str, str, str]:
    """The device and the reason for it, the precision and the reason for it. "auto" tries whether CUDA really opens."""
    if device != "auto":
        chosen, reason = choose_precision(precision, device, bundle.manifest.precisions)
        return device, "asked for", chosen, reason
    why_not = "this ONNX Runtime has no CUDA provider"
    if "CUDAExecutionProvider" in load_runtime().get_available_providers():
        try:
            chosen, reason = choose_precision(precision, "cuda", bundle.manifest.precisions)
            open_session(bundle.model(chosen), device="cuda", threads=threads)
            return "cuda", "auto: CUDA works here", chosen, reason
        except DeviceUnavailable as error:
            why_not = str(error)
            log.warning("device auto: using the CPU, since %s", why_not)
    chosen, reason = choose_precision(precision, "cpu", bundle.manifest.precisions)
    return "cpu", f"auto: {why_not}", chosen, reason


def _open_sessions(
    bundle: Bundle, precision: str, device: str, threads: int, execution: Execution
) -> tuple[Session, Session | None]:
    """The session for a batch alone, and the one for several at a time, where the mode has one.

    The model's digest is computed while it is loaded, which halves the time for cappy-large. In mode "both" the second
    session is opened when there first are several batches, after the file was checked again.
    """
    model = bundle.model(precision)
    with ThreadPoolExecutor(1) as beside:
        checked = beside.submit(bundle.check_model, precision)
        try:
            first = open_session(model, device=device, threads=1 if execution.mode == "throughput" else threads)
        except CappyError:
            checked.result()  # that the file was changed explains more than that it cannot be loaded
            raise
        checked.result()
    if execution.mode != "both":
        return first, first if execution.mode == "throughput" else None

    def open_narrow() -> Session:
        bundle.check_model(precision)
        return open_session(model, device=device, threads=1)

    return first, LazySession(open_narrow, device=device)
