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
from cappy_engine.cpu.cores import cpu_name, usable_cores
from cappy_engine.cpu.execution import (
    BATCH_TOKENS,
    MODES,
    Execution,
    choose_execution,
    read_tuned,
    tuned_folder,
    tuned_key,
)
from cappy_engine.errors import CappyError, DeviceUnavailable, PrecisionUnavailable
from cappy_engine.gpu.start import GpuPlan, open_for_gpus, require_installation
from cappy_engine.session import DEVICES, LazySession, Session, load_runtime, open_session

AUTO_PRECISIONS = {"cpu": ("fp32", "int8", "fp16"), "cuda": ("fp32", "fp16"), "tensorrt": ("fp32", "fp16", "int8")}
"""What precision="auto" takes, first found first, and what a device runs at all. Exact scores come before fast ones:
int8 changes scores by more than rounding and must be asked for; fp16 is slow on a CPU, and not measured on a GPU."""

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
    gpus: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Opened:
    """The session for a batch alone, the one that takes `callers` at a time where there is one, and what was chosen."""

    session: Session
    narrow_session: Session | None
    callers: int
    info: ScorerInfo


@dataclass(frozen=True)
class _Chosen:
    """The device and the precision, with reasons; on a GPU the session, which is how it was found out."""

    device: str
    device_reason: str
    precision: str
    precision_reason: str
    session: Session | None = None
    plan: GpuPlan | None = None


def open_for_scoring(
    bundle: Bundle,
    *,
    device: str,
    precision: str,
    threads: int | None,
    mode: str,
    max_batch_tokens: int | None,
    name: str,
    gpus: Sequence[int] | None = None,
) -> Opened:
    """Open what `Scorer.open` asks for, with its options and errors; `name` is the bundle's in the info."""
    check_options(device, precision, mode, threads, max_batch_tokens)
    if gpus is not None and device not in ("cuda", "tensorrt"):
        raise ValueError(f"gpus {list(gpus)} need a device that has some: cuda or tensorrt, not {device!r}")
    cores = usable_cores() if threads is None else threads
    chosen = _choose(bundle, device, precision, (0,) if gpus is None else gpus, max_batch_tokens)
    if chosen.session is not None and chosen.plan is not None:
        return _opened_on_gpus(bundle, chosen, chosen.session, chosen.plan, cores, name)
    precision = chosen.precision
    execution = choose_execution(
        mode,
        device="cpu",
        threads=cores,
        model_bytes=sum(bundle.manifest.files[file].size_bytes for file in bundle.model_files(precision)),
        tuned=read_tuned(tuned_folder(), tuned_key(tuning_facts(bundle, precision, cores))),
        max_batch_tokens=max_batch_tokens,
    )
    if precision in bundle.manifest.batch_dependent:
        log.warning("int8 of %s has one scale for a whole batch, so pairs run one by one; export it again", name)
        execution = dataclasses.replace(execution, max_batch_tokens=1)
    session, narrow_session = _open_sessions(bundle, precision, cores, execution)
    info = ScorerInfo(
        bundle=name,
        device="cpu",
        device_reason=chosen.device_reason,
        precision=precision,
        precision_reason=chosen.precision_reason,
        threads=cores,
        mode=execution.mode,
        mode_reason=execution.reason,
        padding="removed" if ("cpu", precision) in bundle.manifest.unpadded else "avoided",
        max_batch_tokens=execution.max_batch_tokens,
        max_length=bundle.manifest.max_length,
    )
    return Opened(session, narrow_session, cores, info)


def choose_precision(asked: str, device: str, available: Sequence[str]) -> tuple[str, str]:
    """The precision to run, and why: `asked`, or for "auto" the first of AUTO_PRECISIONS that is available.

    Raises DeviceUnavailable if the device does not run that precision, PrecisionUnavailable if nothing is available.
    """
    order = AUTO_PRECISIONS[device]
    if asked == "auto" and not available:
        raise PrecisionUnavailable(f"the bundle has no model for {device}; export it with --target {device}")
    found = asked if asked != "auto" else next((name for name in order if name in available), available[0])
    if found not in order:
        raise DeviceUnavailable(f"{found} does not run on {device}, which runs {', '.join(order)}")
    return found, "asked for" if asked != "auto" else f"auto: the first of {', '.join(order)} in the bundle"


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


def _choose(bundle: Bundle, device: str, precision: str, gpus: Sequence[int], max_batch_tokens: int | None) -> _Chosen:
    """What to run on; a GPU is chosen by opening it. "auto" takes CUDA where that works, else the CPU."""
    available = bundle.manifest.precisions_for
    if device == "cpu":
        return _Chosen("cpu", "asked for", *choose_precision(precision, "cpu", available("cpu")))
    if device != "auto":
        return _open_gpus(bundle, device, "asked for", precision, gpus, max_batch_tokens)
    why_not = "this ONNX Runtime has no CUDA provider"
    if "CUDAExecutionProvider" in load_runtime().get_available_providers():
        try:
            return _open_gpus(bundle, "cuda", "auto: CUDA works here", precision, gpus, max_batch_tokens)
        except (DeviceUnavailable, PrecisionUnavailable) as error:
            what, *causes = (line.strip() for line in str(error).splitlines())
            # The fixes are what cappy doctor is for.
            why_not = f"{what} {'; '.join(cause for cause in causes if not cause.startswith('fix:'))}".strip()
            log.warning("device auto: using the CPU, since %s", why_not)
    return _Chosen("cpu", f"auto: {why_not}", *choose_precision(precision, "cpu", available("cpu")))


def _open_gpus(
    bundle: Bundle, device: str, reason: str, precision: str, gpus: Sequence[int], max_batch_tokens: int | None
) -> _Chosen:
    installation = require_installation(device, gpus)
    found, why = choose_precision(precision, device, bundle.manifest.precisions_for(device))
    budget = max_batch_tokens or BATCH_TOKENS[device]
    session, plan = open_for_gpus(bundle, device, found, installation, gpus=gpus, max_batch_tokens=budget)
    return _Chosen(device, reason, found, why, session, plan)


def _opened_on_gpus(bundle: Bundle, chosen: _Chosen, session: Session, plan: GpuPlan, cores: int, name: str) -> Opened:
    info = ScorerInfo(
        bundle=name,
        device=plan.device,
        device_reason=chosen.device_reason,
        precision=plan.precision,
        precision_reason=chosen.precision_reason,
        threads=cores,
        mode="latency",
        mode_reason="one session" if len(plan.gpus) == 1 else f"one session on each of {len(plan.gpus)} GPUs",
        padding=plan.padding,
        max_batch_tokens=plan.max_batch_tokens,
        max_length=bundle.manifest.max_length,
        gpus=plan.gpus,
        buckets=plan.buckets,
    )
    return Opened(session, session if len(plan.gpus) > 1 else None, len(plan.gpus), info)


def _open_sessions(
    bundle: Bundle, precision: str, threads: int, execution: Execution
) -> tuple[Session, Session | None]:
    """The CPU's session for a batch alone, and the one for several at a time, where the mode has one.

    The model's digest is computed while it is loaded, which halves the time for cappy-large. In mode "both" the second
    session is opened when there first are several batches, after the file was checked again.
    """
    model = bundle.model(precision)
    with ThreadPoolExecutor(1) as beside:
        checked = beside.submit(bundle.check_model, precision)
        try:
            first = open_session(model, threads=1 if execution.mode == "throughput" else threads)
        except CappyError:
            checked.result()  # that the file was changed explains more than that it cannot be loaded
            raise
        checked.result()
    if execution.mode != "both":
        return first, first if execution.mode == "throughput" else None

    def open_narrow() -> Session:
        bundle.check_model(precision)
        return open_session(model, threads=1)

    return first, LazySession(open_narrow, device="cpu")
