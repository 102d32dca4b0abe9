"""One model on one device: ONNX Runtime, made to refuse where it would silently do something else.

The only module of the engine that knows ONNX Runtime. What it guards against: `get_available_providers()` lists CUDA on
machines without a GPU, and `InferenceSession(providers=["CUDAExecutionProvider"])` then succeeds on the CPU; a failing
run rebuilds the session on other providers; `onnxruntime` and `onnxruntime-gpu` overwrite each other's files.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cappy_engine import batching
from cappy_engine.errors import BundleError, DeviceUnavailable, InstallationError, ScoringError
from cappy_engine.gpu.installation import (
    installed_packages,
)
from cappy_engine.gpu.placement import census
from cappy_engine.gpu.preflight import (
    PROVIDERS,
)
from cappy_engine.gpu.providers import session_entries

DEVICES = tuple(PROVIDERS)
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
Providers = Sequence[tuple[str, Mapping[str, str]]]

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

    @property
    def placed(self) -> dict[str, Counter[str]]:
        """Which provider runs which operators, counted; known off the CPU only."""
        try:
            return census(self._session.get_provider_graph_assignment_info())
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            raise DeviceUnavailable(
                f"ONNX Runtime does not tell which nodes run on {self.device} ({error}); install cappy-engine[gpu]"
            ) from error

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


def open_session(
    model: Path, *, device: str = "cpu", threads: int | None = None, providers: Providers | None = None
) -> OrtSession:
    """Load `model` on `device`, with `threads` CPU threads (None: one for each physical core).

    `providers` are ONNX Runtime's with their options, the device's own first; on the CPU there is one, without options.

    Raises DeviceUnavailable if the device cannot be used, BundleError if the file is no model with the inputs and
    output of a bundle, InstallationError if there is no ONNX Runtime, or more than one.
    """
    runtime = load_runtime()
    provider = check_device(device, runtime.get_available_providers(), runtime.__version__)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: its warnings go to stderr and are about graph optimisation
    for key, value in session_entries(device).items():
        options.add_session_config_entry(key, value)
    try:
        session = runtime.InferenceSession(
            str(model),
            options,
            providers=[(name, dict(chosen)) for name, chosen in providers or [(provider, {})]],
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        if device != "cpu":
            raise DeviceUnavailable(f"ONNX Runtime {runtime.__version__} cannot use {device}: {error}") from error
        raise BundleError(f"ONNX Runtime {runtime.__version__} cannot load {model}: {error}") from error
    session.disable_fallback()
    check_providers(device, session.get_providers())
    check_signature(model, [entry.name for entry in session.get_inputs()], [out.name for out in session.get_outputs()])
    return OrtSession(session, device=device)


def model_inputs(
    token_ids: Sequence[npt.NDArray[np.int64]],
    type_ids: Sequence[npt.NDArray[np.int64]],
    lengths: npt.NDArray[np.int64],
    batch: batching.Batch,
    *,
    pad_token_id: int,
) -> dict[str, npt.NDArray[np.int64]]:
    """What a session is run with: `INPUTS` of the batch's rows by name, each (batch, length) int64."""
    ids = batching.pad(token_ids, batch, value=pad_token_id)
    return {
        "input_ids": ids,
        "attention_mask": batching.attention_mask(lengths, batch),
        "token_type_ids": batching.pad(type_ids, batch, value=0),
        "position_ids": batching.position_ids(ids, pad_token_id=pad_token_id),
    }


def load_runtime() -> Any:
    """Import ONNX Runtime; raises InstallationError unless exactly one of its packages is installed."""
    installed = list(installed_packages())
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


def check_device(device: str, available: Sequence[str], version: str) -> str:
    """The provider for `device`; raises DeviceUnavailable where this ONNX Runtime has none, else ValueError."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose from auto, {', '.join(DEVICES)}")
    provider = PROVIDERS[device]
    if provider not in available:
        raise DeviceUnavailable(
            f"device {device!r} needs {provider}, and this ONNX Runtime {version} has only {', '.join(available)}; "
            "install cappy-engine[gpu] instead of cappy-engine[cpu], or use device='cpu'"
        )
    return provider


def check_providers(device: str, registered: Sequence[str]) -> None:
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
