"""Open a bundle's model on GPUs, and refuse whatever would be wrong later.

In this order: is everything installed (preflight), does the session open, does the device's own provider run the model
(operator_providers), are the scores right (canary). TensorRT runs one engine for each bucket, built at first and kept
in a private folder (engines). Nothing here falls back.

CUDA ran on one H200 (docs/gpu.md). TensorRT was written from documented facts, and its decisions are tested with fakes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cappy_engine.canary import check_canary, read_canary
from cappy_engine.errors import BundleError, DeviceUnavailable
from cappy_engine.gpu.engines import EngineCache, engine_folder
from cappy_engine.gpu.installation import TENSORRT_LIBRARIES, Installation, inspect_installation
from cappy_engine.gpu.operator_providers import check_operator_providers, warn_if_slow
from cappy_engine.gpu.plan import GpuModel, batch_flops, canary_batches
from cappy_engine.gpu.preflight import require_device
from cappy_engine.gpu.providers import cuda_options, tensorrt_options
from cappy_engine.gpu.sessions import BucketedSession, SharedSession, naming_gpu
from cappy_engine.inputs import full_batch
from cappy_engine.session import INPUTS, Providers, Session, load_runtime, open_session

NO_TF32 = "NVIDIA_TF32_OVERRIDE"

log = logging.getLogger(__name__)


class PlacedSession(Session, Protocol):
    """A session that tells which provider runs what."""

    @property
    def placed(self) -> Mapping[str, Counter[str]]:
        """Count the operators of each provider."""


@dataclass(frozen=True)
class Machine:
    """Everything that models are opened with: the seam that tests fake.

    `open_model` opens the model in a file with ONNX Runtime's providers and their options. `versions` are those of
    ONNX Runtime, of CUDA as the driver supports it, and of TensorRT. `clock` tells seconds.
    """

    installation: Installation
    open_model: Callable[[Path, Providers], PlacedSession]
    engines: EngineCache
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    clock: Callable[[], float] = time.perf_counter


def find_machine(device: str, gpus: Sequence[int] = (0,), *, threads: int | None = None) -> Machine:
    """Look for all that `device` needs on this machine. Raises what `require_device` does unless it is there.

    Its sessions have `threads` CPU threads for what does not run on a GPU (None: one for each physical core).
    """
    load_runtime()  # raises if it cannot be imported; inspect_installation never raises
    installation = inspect_installation(device=device)
    require_device(installation, device, gpus)
    return Machine(
        installation,
        lambda model, providers: open_session(model, device=device, providers=providers, threads=threads),
        EngineCache(engine_folder()),
        versions={
            "onnxruntime": str(installation.onnxruntime),
            "driver": str(installation.driver),
            "tensorrt": tensorrt_version() if device == "tensorrt" else "",
        },
        environment=os.environ,
    )


def open_on_gpus(model: GpuModel, machine: Machine) -> Session:
    """Open, warm up and check a model on its GPUs; returns the session that shares them.

    Raises DeviceUnavailable if the device is not what was asked for, or scores wrongly, BundleError if the bundle
    cannot prove it, and ScoringError if a run fails. Errors of a GPU have its number.
    """
    if model.device == "tensorrt" and model.precision == "fp32" and machine.environment.get(NO_TF32) != "0":
        raise DeviceUnavailable(
            f"TensorRT computes fp32 in TF32, with 10 bits, unless {NO_TF32}=0 is in the environment before the "
            "process starts; set it, or choose fp16"
        )
    files = model.bundle.open_model(model.precision, model.device)
    files.check()
    canary = read_canary(model.bundle.manifest.document, model.device, model.precision)
    batches = canary_batches(canary.pairs.lengths, model)
    sessions = {}
    for gpu in model.gpus:
        with naming_gpu(gpu):
            session = (_open_cuda if model.device == "cuda" else _open_tensorrt)(model, gpu, machine)
            _warm_up(session, model, gpu, machine.clock)
            error = check_canary(session, canary, batches, pad_token_id=model.pad_token_id)
        log.info("%s on GPU %d: the canary is off by %.2g of %.2g", model.device, gpu, error, canary.tolerance)
        sessions[gpu] = session
    files.check_loaded()
    return session if len(sessions) == 1 else SharedSession(sessions, device=model.device)


def tensorrt_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Ask the TensorRT that is loaded for its version (NvInferRuntime.h, getInferLibVersion)."""
    try:
        return str(load(TENSORRT_LIBRARIES[0]).getInferLibVersion())
    except (OSError, AttributeError) as error:
        raise DeviceUnavailable(f"TensorRT does not tell its version ({error}); run 'cappy doctor'") from error


def _open_cuda(model: GpuModel, gpu: int, machine: Machine) -> Session:
    path = model.bundle.model(model.precision, "cuda")
    session = machine.open_model(path, [("CUDAExecutionProvider", cuda_options(gpu=gpu))])
    check_operator_providers("cuda", session.placed)
    return session


def _open_tensorrt(model: GpuModel, gpu: int, machine: Machine) -> Session:
    """Open a session for each bucket; its engine was built for exactly this model, machine and shape."""
    sessions = {bucket: _open_bucket(model, bucket, gpu, machine) for bucket in model.grouping.buckets}
    return BucketedSession(sessions, {bucket: model.max_rows(bucket) for bucket in sessions}, device="tensorrt")


def _open_bucket(model: GpuModel, bucket: int, gpu: int, machine: Machine) -> Session:
    path, files = model.bundle.model(model.precision, "tensorrt"), model.bundle.manifest.files
    rows = model.max_rows(bucket)
    options = partial(tensorrt_options, max_rows=rows, length=bucket, inputs=_input_names(model))

    def make(folder: Path) -> PlacedSession:
        own = ("TensorrtExecutionProvider", options(gpu=gpu, cache=folder))
        return machine.open_model(path, [own, ("CUDAExecutionProvider", cuda_options(gpu=gpu))])

    facts = {
        "model_sha256": [files[name].sha256 for name in model.bundle.model_files(model.precision, "tensorrt")],
        "precision": model.precision,
        "profile": f"1 to {rows} x {bucket}",
        "options": options(cache=Path()),  # not this GPU's number and folder: an engine depends on neither
        "gpu": asdict(machine.installation.gpus[gpu]),
        "versions": dict(machine.versions),
    }
    log.info("opening the engine for %d x %d tokens; the first time takes minutes", rows, bucket)
    session = machine.engines.open(facts, make)
    check_operator_providers("tensorrt", session.placed)
    return session


def _input_names(model: GpuModel) -> list[str]:
    try:
        graphs = model.bundle.manifest.document["targets"]["tensorrt"]["graphs"]
        names = graphs[model.precision]["inputs"]
        if not names or not set(names) <= set(INPUTS) or len(set(names)) < len(names):
            raise ValueError(f"{names!r} are not different ones of {', '.join(INPUTS)}")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"bundle {model.bundle.path} does not name the inputs of its TensorRT model ({error!r}); export it again"
        ) from error
    return list(names)


def _warm_up(session: Session, model: GpuModel, gpu: int, clock: Callable[[], float]) -> None:
    """Run a full batch of every bucket twice. Warn if the second run was slow."""
    manifest = model.bundle.manifest
    for length in model.grouping.buckets or (manifest.max_length,):
        rows = model.max_rows(length)
        inputs = full_batch(rows, length, pad_token_id=model.pad_token_id)
        session.run(inputs)
        began = clock()
        session.run(inputs)
        try:
            flops = batch_flops(manifest.document["model"], rows, length)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"bundle {model.bundle.path} does not tell its layers ({error!r}); export it again"
            ) from error
        warn_if_slow(model.device, gpu=gpu, flops=flops, seconds=clock() - began)
