"""Opening a bundle's model on GPUs, and refusing at start whatever would be wrong or silently slow later.

In this order: is everything installed (preflight), does the session open, does the device's own provider run the model
(placement), is a full batch as fast as a GPU's (placement), are the scores right (canary). TensorRT runs one engine for
each bucket, built at first and kept in a private folder (engine_cache). Nothing here falls back.

None of this has run on a GPU yet: it was written from documented facts, and its decisions are tested with fakes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cappy_engine import batching
from cappy_engine.buckets import default_buckets
from cappy_engine.bundle import Bundle
from cappy_engine.errors import BundleError, DeviceUnavailable, ScoringError
from cappy_engine.gpu.canary import check_canary, read_canary
from cappy_engine.gpu.engines import EngineCache, engine_facts, engine_folder, engine_key
from cappy_engine.gpu.installation import (
    TENSORRT_LIBRARIES,
    Gpu,
    Installation,
    inspect_installation,
)
from cappy_engine.gpu.placement import check_placement, check_speed
from cappy_engine.gpu.preflight import (
    require_device,
)
from cappy_engine.gpu.providers import Profile, cuda_options, tensorrt_options
from cappy_engine.session import Providers, Session, load_runtime, open_session

Inputs = Mapping[str, npt.NDArray[np.int64]]
NO_TF32 = "NVIDIA_TF32_OVERRIDE"

log = logging.getLogger(__name__)


class PlacedSession(Session, Protocol):
    """A session that tells which provider runs what."""

    @property
    def placed(self) -> Mapping[str, Counter[str]]:
        """Operators of each provider, counted."""


Open = Callable[[Path, Providers], PlacedSession]
"""Opens the model in a file with these providers and their options: the seam that tests fake."""


@dataclass(frozen=True)
class GpuPlan:
    """What is opened: the model, its precision, the GPUs by their numbers, and the budget of a batch in tokens.

    `padding` is what becomes of it, and `buckets` are the lengths that pairs are padded to; empty where any length will
    do.
    """

    device: str
    precision: str
    gpus: tuple[int, ...]
    max_batch_tokens: int
    padding: batching.Padding
    buckets: tuple[int, ...]


class BucketedSession:
    """One session for each bucket, with a guard: a shape that no engine was built for would stall for minutes."""

    def __init__(self, sessions: Mapping[int, Session], max_rows: Mapping[int, int], *, device: str) -> None:
        self.device = device
        self._sessions = dict(sessions)
        self._max_rows = dict(max_rows)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Score one batch on the engine of its length; ScoringError where there is none, or it takes fewer rows."""
        rows, length = inputs["input_ids"].shape
        if length not in self._sessions or rows > self._max_rows[length]:
            shapes = ", ".join(f"{count} x {bucket}" for bucket, count in self._max_rows.items())
            raise ScoringError(
                f"no engine takes {rows} x {length} tokens; there are engines for up to {shapes}: score with the "
                "scorer's own max_batch_tokens"
            )
        return self._sessions[length].run(inputs)


class SharedSession:
    """The same model on several GPUs: each run takes a free one, and waits if there is none."""

    def __init__(self, sessions: Sequence[Session], *, device: str) -> None:
        self.device = device
        self._free: queue.SimpleQueue[Session] = queue.SimpleQueue()
        for session in sessions:
            self._free.put(session)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Score one batch on a GPU that is free; what it raises goes on: no other GPU tries again."""
        session = self._free.get()
        try:
            return session.run(inputs)
        finally:
            self._free.put(session)


def plan_gpu(
    bundle: Bundle, *, device: str, precision: str, gpus: Sequence[int], max_batch_tokens: int, there: Sequence[Gpu]
) -> GpuPlan:
    """What to open; `there` are the GPUs of this machine.

    Raises DeviceUnavailable for a GPU that is not there, PrecisionUnavailable if the bundle has no such model, and
    BundleError if its buckets are none.
    """
    bundle.model(precision, device)
    missing = [gpu for gpu in gpus if not 0 <= gpu < len(there)]
    if missing or not gpus or len(set(gpus)) < len(gpus):
        raise DeviceUnavailable(
            f"GPUs {list(gpus)} were asked for; there are {len(there)}, numbered from 0, and each is named once"
        )
    buckets: tuple[int, ...] = ()
    if device == "tensorrt":
        max_length = bundle.manifest.max_length
        buckets = bundle.manifest.buckets or default_buckets(max_length)
        if list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != max_length:
            raise BundleError(
                f"the buckets {list(buckets)} of bundle {bundle.path} do not ascend to its {max_length} tokens; "
                "export it again"
            )
    # The graph for CUDA removes padding, but looks up embeddings before, and reserves memory for padded attention: a
    # budget of real tokens alone would not bound either.
    padding: batching.Padding = "avoided" if buckets else "allowed"
    return GpuPlan(device, precision, tuple(gpus), max_batch_tokens, padding, buckets)


def max_rows(bucket: int, max_batch_tokens: int) -> int:
    """How many rows a batch of that length holds, as the planner cuts them."""
    return max(1, max_batch_tokens // bucket)


def open_on_gpus(
    bundle: Bundle,
    plan: GpuPlan,
    installation: Installation,
    *,
    open_model: Open,
    cache: EngineCache,
    versions: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.perf_counter,
) -> Session:
    """Open, warm up and check the model of `plan`; returns the session that shares its GPUs.

    Raises DeviceUnavailable if the device is not what was asked for, or scores wrongly, BundleError if the bundle
    cannot prove it, and ScoringError if a run fails.
    """
    if plan.device == "tensorrt" and plan.precision == "fp32" and environment.get(NO_TF32) != "0":
        raise DeviceUnavailable(
            f"TensorRT computes fp32 in TF32, with 10 bits, unless {NO_TF32}=0 is in the environment before the "
            "process starts; set it, or choose fp16"
        )
    bundle.check_model(plan.precision, plan.device)
    canary = read_canary(bundle.manifest.document, plan.device, plan.precision)
    sessions = []
    for gpu in plan.gpus:
        if plan.device == "cuda":
            session: Session = _open_cuda(bundle, plan, gpu, open_model)
        else:
            described = installation.gpus[gpu]
            session = _open_tensorrt(bundle, plan, gpu, described, open_model, cache, dict(versions))
        _warm_up(session, bundle, plan, clock)
        batches = canary_batches(canary.lengths, plan)
        error = check_canary(session, canary, batches, device=plan.device, pad_token_id=bundle.manifest.pad_token_id)
        log.info("%s on GPU %d: the canary is off by %.2g of %.2g", plan.device, gpu, error, canary.tolerance)
        sessions.append(session)
    return sessions[0] if len(sessions) == 1 else SharedSession(sessions, device=plan.device)


def require_installation(device: str, gpus: Sequence[int] = (0,)) -> Installation:
    """What is installed on this machine; raises what `require_device` does unless it is all that `device` needs."""
    runtime = load_runtime()
    installation = inspect_installation(
        device=device,
        available_providers=runtime.get_available_providers,
        preload=getattr(runtime, "preload_dlls", lambda: None),  # CUDA and cuDNN from site-packages
    )
    require_device(installation, device, gpus)
    return installation


def open_for_gpus(
    bundle: Bundle,
    device: str,
    precision: str,
    installation: Installation,
    *,
    gpus: Sequence[int],
    max_batch_tokens: int,
) -> tuple[Session, GpuPlan]:
    """`open_on_gpus` with this machine's ONNX Runtime, and what was planned; raises, too, what `plan_gpu` does."""
    plan = plan_gpu(
        bundle,
        device=device,
        precision=precision,
        gpus=gpus,
        max_batch_tokens=max_batch_tokens,
        there=installation.gpus,
    )
    versions = {
        "onnxruntime": str(installation.onnxruntime),
        "driver": str(installation.driver),
        "tensorrt": tensorrt_version() if device == "tensorrt" else "",
    }
    session = open_on_gpus(
        bundle,
        plan,
        installation,
        open_model=lambda model, providers: open_session(model, device=device, providers=providers),
        cache=EngineCache(engine_folder()),
        versions=versions,
    )
    return session, plan


def canary_batches(lengths: npt.NDArray[np.int64], plan: GpuPlan) -> list[batching.Batch]:
    """The canary's batches: as the scorer would plan them; with buckets every pair in each that it fits into, since
    each of those has an engine of its own."""
    if not plan.buckets:
        return batching.plan_batches(lengths, max_batch_tokens=plan.max_batch_tokens, padding=plan.padding)
    batches = []
    for bucket in plan.buckets:
        rows = np.flatnonzero(lengths <= bucket)
        most = max_rows(bucket, plan.max_batch_tokens)
        batches += [batching.Batch(rows[start : start + most], bucket) for start in range(0, len(rows), most)]
    return batches


def full_batch(rows: int, length: int, *, pad_token_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Inputs of that shape without padding, of a token that every vocabulary has."""
    ids = np.full((rows, length), 0 if pad_token_id else 1, dtype=np.int64)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": batching.position_ids(ids, pad_token_id=pad_token_id),
    }


def batch_flops(model: Mapping[str, Any], rows: int, length: int) -> float:
    """About how many operations a batch takes: the products of layers whose feed-forward is 4 times as wide."""
    return 24.0 * int(model["layers"]) * int(model["hidden_size"]) ** 2 * rows * length


def _open_cuda(bundle: Bundle, plan: GpuPlan, gpu: int, open_model: Open) -> Session:
    session = open_model(bundle.model(plan.precision, "cuda"), [("CUDAExecutionProvider", cuda_options(gpu=gpu))])
    check_placement("cuda", session.placed)
    return session


def _open_tensorrt(
    bundle: Bundle,
    plan: GpuPlan,
    gpu: int,
    described: Gpu,
    open_model: Open,
    cache: EngineCache,
    versions: Mapping[str, str],
) -> Session:
    """A session for each bucket, with an engine that was built for exactly this model, machine and shape."""
    model = bundle.model(plan.precision, "tensorrt")
    inputs = _input_names(bundle, plan.precision)
    digests = [bundle.manifest.files[name].sha256 for name in bundle.model_files(plan.precision, "tensorrt")]
    sessions, rows = {}, {}
    for bucket in plan.buckets:
        profile = Profile(bucket, max_rows(bucket, plan.max_batch_tokens))

        def options(folder: Path, profile: Profile = profile) -> dict[str, str]:
            return tensorrt_options(gpu=gpu, profile=profile, inputs=inputs, cache=folder, precision=plan.precision)

        def make(folder: Path, options: Callable[[Path], dict[str, str]] = options) -> PlacedSession:
            return open_model(
                model,
                [("TensorrtExecutionProvider", options(folder)), ("CUDAExecutionProvider", cuda_options(gpu=gpu))],
            )

        facts = engine_facts(
            model_sha256=digests,
            precision=plan.precision,
            profile_text=f"{profile.min_rows} to {profile.max_rows} x {profile.length}",
            options=options(Path()),
            gpu={
                "name": described.name,
                "compute_capability": described.compute_capability,
                "memory_bytes": str(described.memory_bytes),
            },
            versions=versions,
        )
        log.info("opening the engine for %d x %d tokens; the first time takes minutes", profile.max_rows, bucket)
        session = cache.open(engine_key(facts), facts, make)
        check_placement("tensorrt", session.placed)
        sessions[bucket], rows[bucket] = session, profile.max_rows
    return BucketedSession(sessions, rows, device="tensorrt")


def _input_names(bundle: Bundle, precision: str) -> list[str]:
    try:
        return [str(name) for name in bundle.manifest.document["targets"]["tensorrt"]["graphs"][precision]["inputs"]]
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"bundle {bundle.path} does not name the inputs of its TensorRT model; export it again"
        ) from error


def _warm_up(session: Session, bundle: Bundle, plan: GpuPlan, clock: Callable[[], float]) -> None:
    """Run a full batch of every bucket twice; the second run must be as fast as a GPU's."""
    model, pad_token_id = bundle.manifest.document["model"], bundle.manifest.pad_token_id
    for length in plan.buckets or (bundle.manifest.max_length,):
        rows = max_rows(length, plan.max_batch_tokens)
        inputs = full_batch(rows, length, pad_token_id=pad_token_id)
        session.run(inputs)
        began = clock()
        session.run(inputs)
        check_speed(plan.device, flops=batch_flops(model, rows, length), seconds=clock() - began)


def tensorrt_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """The version of the TensorRT that is loaded, as its library tells it (NvInferRuntime.h, getInferLibVersion)."""
    try:
        return str(load(TENSORRT_LIBRARIES[0]).getInferLibVersion())
    except (OSError, AttributeError) as error:
        raise DeviceUnavailable(f"TensorRT does not tell its version ({error}); run 'cappy doctor'") from error
