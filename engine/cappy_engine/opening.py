"""Open what was asked for: device, precision, threads and mode become a dispatcher.

What cannot be delivered is an error. Nothing falls back: what is asked for by name is what runs. `ScorerInfo` says what
"auto" chose, with the reason.
"""

from __future__ import annotations

import dataclasses
import logging

from cappy_engine.batching import Grouping, Scores
from cappy_engine.bundle import Bundle
from cappy_engine.bundle_files import ModelFiles
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.cpu.execution import choose_execution
from cappy_engine.cpu.kernels import COST, choose_kernels
from cappy_engine.cpu.tuned import read_tuned, tuned_key, tuning_facts
from cappy_engine.dispatcher import Dispatcher, LazySession
from cappy_engine.errors import BundleError, DeviceUnavailable, PrecisionUnavailable
from cappy_engine.gpu.plan import BATCH_TOKENS, plan_gpu
from cappy_engine.gpu.start import find_machine, open_on_gpus
from cappy_engine.native.library import ChosenSet
from cappy_engine.options import ScorerInfo, ScorerOptions, choose_precision
from cappy_engine.session import PROVIDERS, Inputs, Session, load_runtime, open_session
from cappy_engine.storage import cache_folder

log = logging.getLogger(__name__)


def open_dispatcher(bundle: Bundle, options: ScorerOptions, *, name: str) -> tuple[Dispatcher, ScorerInfo]:
    """Open what `options` ask for; `name` is the bundle's in the info. Raises what `Scorer.open` raises.

    A GPU is chosen by opening it: "auto" takes CUDA where that works, else the CPU.

        >>> dispatcher, info = open_dispatcher(open_bundle("cappy-bundle"), ScorerOptions(), name="cappy-bundle")
    """
    if options.device == "cpu":
        return _open_on_cpu(bundle, options, name=name, reason="asked for")
    if options.device != "auto":
        return _open_on_gpus(bundle, options, name=name, reason="asked for")
    why_not = "this ONNX Runtime has no CUDA provider"
    if PROVIDERS["cuda"] in load_runtime().get_available_providers():
        on_cuda = dataclasses.replace(options, device="cuda")
        try:
            return _open_on_gpus(bundle, on_cuda, name=name, reason="auto: CUDA works here")
        except (DeviceUnavailable, PrecisionUnavailable) as error:
            what, *causes = (line.strip() for line in str(error).splitlines())
            # The fixes are what cappy doctor is for.
            why_not = f"{what} {'; '.join(cause for cause in causes if not cause.startswith('fix:'))}".strip()
            log.warning("device auto: using the CPU, since %s", why_not)
    return _open_on_cpu(bundle, options, name=name, reason=f"auto: {why_not}")


def _open_on_cpu(bundle: Bundle, options: ScorerOptions, *, name: str, reason: str) -> tuple[Dispatcher, ScorerInfo]:
    precision, precision_reason = choose_precision(options.precision, "cpu", bundle.manifest.precisions)
    threads = options.threads or usable_cores()
    is_asked_for = options.mode != "auto" and options.max_batch_tokens is not None
    tuned = None if is_asked_for else read_tuned(cache_folder(), tuned_key(tuning_facts(bundle, precision, threads)))
    execution = choose_execution(
        options.mode,
        threads=threads,
        model_bytes=sum(bundle.manifest.files[file].size_bytes for file in bundle.model_files(precision)),
        tuned=tuned,
        max_batch_tokens=options.max_batch_tokens,
    )
    kernels = choose_kernels(bundle, precision)
    session, narrow_session = _open_sessions(bundle, precision, threads, execution.mode, kernels.chosen)
    info = ScorerInfo(
        bundle=name,
        device="cpu",
        device_reason=reason,
        precision=precision,
        precision_reason=precision_reason,
        threads=threads,
        mode=execution.mode,
        mode_reason=execution.reason,
        padding="removed" if ("cpu", precision) in bundle.manifest.unpadded else "avoided",
        max_batch_tokens=execution.max_batch_tokens,
        max_length=bundle.manifest.max_length,
        kernels=kernels.told,
    )
    cost = f" ({COST})" if precision == "int8" and not kernels.library else ""
    log.info("kernels for %s on the CPU: %s%s", precision, info.kernels, cost)
    return _dispatcher(bundle, info, session, narrow_session, callers=threads), info


def _open_on_gpus(bundle: Bundle, options: ScorerOptions, *, name: str, reason: str) -> tuple[Dispatcher, ScorerInfo]:
    device, gpus = options.device, options.gpus or (0,)
    threads = options.threads or usable_cores()
    machine = find_machine(device, gpus, threads=threads)
    precision, precision_reason = choose_precision(options.precision, device, bundle.manifest.precisions_for(device))
    model = plan_gpu(
        bundle,
        device,
        precision,
        gpus=gpus,
        max_batch_tokens=options.max_batch_tokens or BATCH_TOKENS,
        there=machine.installation.gpus,
    )
    session = open_on_gpus(model, machine)
    info = ScorerInfo(
        bundle=name,
        device=device,
        device_reason=reason,
        precision=precision,
        precision_reason=precision_reason,
        threads=threads,
        mode="latency",
        mode_reason="one session" if len(gpus) == 1 else f"one session on each of {len(gpus)} GPUs",
        padding=model.grouping.padding,
        max_batch_tokens=model.grouping.max_batch_tokens,
        max_length=bundle.manifest.max_length,
        gpus=gpus,
        buckets=model.grouping.buckets,
    )
    return _dispatcher(bundle, info, session, session if len(gpus) > 1 else None, callers=len(gpus)), info


def _dispatcher(
    bundle: Bundle, info: ScorerInfo, session: Session, narrow_session: Session | None, *, callers: int
) -> Dispatcher:
    return Dispatcher(
        session,
        Grouping(info.max_batch_tokens, info.padding, info.buckets),
        pad_token_id=bundle.manifest.pad_token_id,
        narrow_session=narrow_session,
        callers=callers,
    )


def _open_sessions(
    bundle: Bundle, precision: str, threads: int, mode: str, kernels: ChosenSet | None
) -> tuple[Session, Session | None]:
    """Open the CPU's sessions: for one batch on all threads, and for several batches if `mode` has one.

    In mode "both" the second session is opened when there first are several batches. It is a matter of speed only: if
    the bundle was changed meanwhile, the first one goes on alone. A forked child opens its sessions again.
    """
    threads = 1 if mode == "throughput" else threads

    def open_again() -> Session:
        with bundle.used_again():
            return _open_checked(bundle, precision, threads, kernels)

    first = LazySession(open_again, session=_open_checked(bundle, precision, threads, kernels))
    if mode != "both":
        return first, first if mode == "throughput" else None

    def open_narrow() -> Session:
        try:
            with bundle.used_again():
                return _open_checked(bundle, precision, 1, kernels)
        except BundleError as error:
            log.warning("several batches run on one session, which is slower: %s", error)
            return first

    return first, LazySession(open_narrow)


def _open_checked(bundle: Bundle, precision: str, threads: int, kernels: ChosenSet | None) -> Session:
    with bundle.checked(precision) as files:
        session = open_session(files.path, threads=threads, kernels=kernels)
    return WatchedSession(session, files) if files.is_mapped else session


class WatchedSession:
    """A session whose weights are mapped from a file: no score is returned after that was written over."""

    def __init__(self, session: Session, files: ModelFiles) -> None:
        self.device = session.device
        self._session = session
        self._files = files

    def run(self, inputs: Inputs) -> Scores:
        """Score one batch, as the session does. Raises ScoringError if the file is not as it was."""
        self._files.check_in_place()
        scores = self._session.run(inputs)
        self._files.check_in_place()
        return scores
