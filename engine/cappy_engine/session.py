"""One model on one device: ONNX Runtime, made to refuse where it would silently do something else.

The only module of the engine that knows ONNX Runtime. What it guards against: `get_available_providers()` lists CUDA on
machines without a GPU, and `InferenceSession(providers=["CUDAExecutionProvider"])` then succeeds on the CPU; a failing
run rebuilds the session on other providers; `onnxruntime` and `onnxruntime-gpu` overwrite each other's files.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cappy_engine.errors import BundleError, DeviceUnavailable, InstallationError, ScoringError

DEVICES = ("cpu", "cuda", "tensorrt")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PROVIDERS: Mapping[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROVIDER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "cpu": {},
    "cuda": {"use_tf32": "0"},  # on by default, and it would make fp32 a format of 10 bits
}
RUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)

log = logging.getLogger(__name__)


class Session(Protocol):
    """The seam that tests fake: token arrays in, scores out."""

    device: str

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """Score one batch: `INPUTS` by name, each (batch, length) int64; returns (batch,) float32."""


class OrtSession:
    """A model in ONNX Runtime; made by `open_session`. Safe to call from several threads."""

    def __init__(self, session: Any, *, device: str) -> None:
        self.device = device
        self._session = session
        self._inputs = [entry.name for entry in session.get_inputs()]

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """Score one batch: `INPUTS` by name, each (batch, length) int64; returns (batch,) float32.

        Raises ScoringError if ONNX Runtime fails; the run is not repeated on another device.
        """
        try:
            (logits,) = self._session.run(["logits"], {name: inputs[name] for name in self._inputs})
            logits = np.asarray(logits)
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            shape = inputs["input_ids"].shape
            raise ScoringError(f"ONNX Runtime failed on a batch of shape {shape} on {self.device}: {error}") from error
        if logits.shape != (len(inputs["input_ids"]), 1):
            raise ScoringError(f"the model gave logits of shape {logits.shape} for {len(inputs['input_ids'])} pairs")
        scores: npt.NDArray[np.float32] = logits[:, 0].astype(np.float32)
        return scores


class LazySession:
    """A session that is opened, by `open_now`, when it is first run; safe to call from several threads."""

    def __init__(self, open_now: Callable[[], Session], *, device: str) -> None:
        self.device = device
        self._open_now = open_now
        self._lock = threading.Lock()
        self._session: Session | None = None

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """Score one batch, as the session does; raises what opening it raises, too."""
        with self._lock:
            if self._session is None:
                self._session = self._open_now()
        return self._session.run(inputs)


def open_session(model: Path, *, device: str = "cpu", threads: int | None = None) -> OrtSession:
    """Load `model` on `device` ("cpu" or "cuda"), with `threads` threads (None: one for each physical core).

    Raises DeviceUnavailable if the device cannot be used, BundleError if the file is no model with the inputs and
    output of a bundle, InstallationError if there is no ONNX Runtime, or more than one.
    """
    runtime = load_runtime()
    provider = check_device(device, runtime.get_available_providers(), runtime.__version__)
    if device != "cpu" and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # CUDA and cuDNN from site-packages, where the loader does not look
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: its warnings go to stderr and are about graph optimisation
    try:
        session = runtime.InferenceSession(
            str(model), options, providers=[(provider, dict(PROVIDER_OPTIONS[device]))], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        if device != "cpu":
            raise DeviceUnavailable(f"ONNX Runtime {runtime.__version__} cannot use {device}: {error}") from error
        raise BundleError(f"ONNX Runtime {runtime.__version__} cannot load {model}: {error}") from error
    session.disable_fallback()
    check_providers(device, session.get_providers())
    check_signature(model, [entry.name for entry in session.get_inputs()], [out.name for out in session.get_outputs()])
    return OrtSession(session, device=device)


def load_runtime() -> Any:
    """Import ONNX Runtime; raises InstallationError unless exactly one of its packages is installed."""
    installed = [name for name in RUNTIME_PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        raise InstallationError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files; "
            f"run 'pip uninstall -y {' '.join(installed)}', then install one of cappy-engine[cpu] and cappy-engine[gpu]"
        )
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise InstallationError(
            f"ONNX Runtime cannot be imported ({error}); install one of cappy-engine[cpu] and cappy-engine[gpu]"
        ) from error


def check_device(device: str, available: list[str], version: str) -> str:
    """The provider for `device`; raises DeviceUnavailable where this ONNX Runtime has none, else ValueError."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose from auto, {', '.join(DEVICES)}")
    if device not in PROVIDERS:
        raise DeviceUnavailable(f"device {device!r} is not supported by this version of cappy-engine; use cuda or cpu")
    provider = PROVIDERS[device]
    if provider not in available:
        raise DeviceUnavailable(
            f"device {device!r} needs {provider}, and this ONNX Runtime {version} has only {', '.join(available)}; "
            "install cappy-engine[gpu] instead of cappy-engine[cpu], or use device='cpu'"
        )
    return provider


def check_providers(device: str, registered: list[str]) -> None:
    """Raise DeviceUnavailable if a session that was opened for `device` came up without it."""
    if PROVIDERS[device] not in registered:
        raise DeviceUnavailable(
            f"device {device!r} was asked for, but ONNX Runtime came up with {', '.join(registered)}: the driver or "
            "its libraries (CUDA, cuDNN) are missing or too old; run with device='cpu', or mend the installation"
        )


def check_signature(model: Path, inputs: list[str], outputs: list[str]) -> None:
    """Raise BundleError unless the model takes token arrays by the usual names and gives `logits`."""
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or "input_ids" not in inputs or "logits" not in outputs:
        raise BundleError(
            f"{model} takes {inputs} and gives {outputs}; a bundle's model takes {INPUTS} and gives logits"
        )


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
