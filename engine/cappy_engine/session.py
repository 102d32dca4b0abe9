"""Open one model on one device: ONNX Runtime, made to refuse where it would silently do something else.

The only module of the engine that knows ONNX Runtime. What it guards against: `get_available_providers()` lists CUDA on
machines without a GPU, and `InferenceSession(providers=["CUDAExecutionProvider"])` then succeeds on the CPU; a failing
run rebuilds the session on other providers; `onnxruntime` and `onnxruntime-gpu` overwrite each other's files.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cappy_engine.errors import (
    BundleError,
    DeviceUnavailable,
    InstallationError,
    ScoringError,
    install_hint,
    is_callers,
)
from cappy_engine.forking import never_free, tell_after_fork
from cappy_engine.native.library import ChosenSet, NativeLibrary

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's execution provider for each device."""
DEVICES = tuple(PROVIDERS)
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
RUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
"""Packages that hold ONNX Runtime, all in one import directory: only one may be installed."""
OPEN_IN_CHILD = "open the scorer after the fork, in the child process"
Inputs = Mapping[str, npt.NDArray[np.int64]]
"""`INPUTS` by name, each (batch, length)."""
Providers = Sequence[tuple[str, Mapping[str, str]]]
"""ONNX Runtime's providers with their options, the device's own first."""


class Session(Protocol):
    """The seam that tests fake: token arrays in, scores out (`cappy_engine.testing`)."""

    device: str

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Score one batch: `INPUTS` by name, each (batch, length) int64; returns (batch,) float32."""


class OrtSession:
    """A model in ONNX Runtime; made by `open_session`. Safe to call from several threads, but not in a forked child."""

    def __init__(self, session: Any, *, device: str) -> None:
        self.device = device
        self._session = session
        self._is_forked = False
        self._inputs = [entry.name for entry in session.get_inputs()]
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Give the parent's session up: its threads are not here, and freeing it would wait for them."""
        never_free(self._session)
        self._is_forked = True

    def __del__(self) -> None:
        """Free the model; the C library would keep its memory."""
        if not self._is_forked and not sys.is_finalizing():
            self._session = None  # not deleted: after a fork in the midst of this, the child asks for it
            give_memory_back()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Name the model's inputs."""
        return tuple(self._inputs)

    @property
    def placed(self) -> dict[str, Counter[str]]:
        """Count the operators that each provider runs. Known off the CPU only."""
        try:
            return census(self._session.get_provider_graph_assignment_info())
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            if is_callers(error):
                raise
            raise DeviceUnavailable(
                f"ONNX Runtime does not tell which nodes run on {self.device} ({error}); {install_hint('gpu')}"
            ) from error

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Score one batch: `INPUTS` by name, each (batch, length) int64; returns (batch,) float32.

        Raises ScoringError if ONNX Runtime fails; the run is not repeated on another device.
        """
        if self._is_forked:
            raise ScoringError(f"this model was opened on {self.device} before the process forked; {OPEN_IN_CHILD}")
        try:
            (logits,) = self._session.run(["logits"], {name: inputs[name] for name in self._inputs})
            logits = np.asarray(logits)
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            if is_callers(error):
                raise
            shape = inputs["input_ids"].shape
            raise ScoringError(f"ONNX Runtime failed on a batch of shape {shape} on {self.device}: {error}") from error
        if logits.shape != (len(inputs["input_ids"]), 1):
            raise ScoringError(f"the model gave logits of shape {logits.shape} for {len(inputs['input_ids'])} pairs")
        scores: npt.NDArray[np.float32] = logits[:, 0].astype(np.float32)
        return scores


class AssignedNode(Protocol):
    """The part of ONNX Runtime's OrtEpAssignedNode that `census` reads."""

    @property
    def op_type(self) -> str:
        """Name the operator, such as MatMul."""


class AssignedSubgraph(Protocol):
    """The part of ONNX Runtime's OrtEpAssignedSubgraph that `census` reads."""

    @property
    def ep_name(self) -> str:
        """Name the provider, such as CUDAExecutionProvider."""

    def get_nodes(self) -> Sequence[AssignedNode]:
        """List its nodes, as they were before the provider fused them."""


def census(assignments: Iterable[AssignedSubgraph]) -> dict[str, Counter[str]]:
    """Count the operators of each provider.

    `assignments` is what InferenceSession.get_provider_graph_assignment_info() returns.
    """
    placed: dict[str, Counter[str]] = {}
    for subgraph in assignments:
        placed.setdefault(subgraph.ep_name, Counter()).update(node.op_type for node in subgraph.get_nodes())
    return placed


def open_session(
    model: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    providers: Providers | None = None,
    kernels: ChosenSet | None = None,
) -> OrtSession:
    """Load `model` on `device`, with `threads` CPU threads (None: one for each physical core).

    `providers` are ONNX Runtime's with their options, the device's own first; on the CPU there is one, without options.
    `kernels` are for operators that are functions in the model: without them these functions run.

    Raises DeviceUnavailable if the device cannot be used, BundleError if the file is not a model with the inputs
    and output of a bundle, InstallationError if there is no ONNX Runtime, or more than one, or it refuses `kernels`.
    """
    runtime = load_runtime()
    provider = check_device(device, runtime.get_available_providers(), runtime.__version__)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Threads that wait for the next run would take the cores from other sessions, and from all that the process does.
    # Pairs alone and in fours, in turn, on two cores: 27 ms each, with this 19 ms; one pair again and again: no slower.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Its warnings go to stderr and are about graph optimisation; a CPU's errors are raised, with the same text.
    options.log_severity_level = 4 if device == "cpu" else 3
    if device != "cpu":  # ONNX Runtime is to tell which node runs where
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if kernels is not None:
        _register(options, kernels, threads, runtime.__version__)
    try:
        session = runtime.InferenceSession(
            str(model),
            options,
            providers=[(name, dict(chosen)) for name, chosen in providers or [(provider, {})]],
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        if is_callers(error):
            raise
        if device != "cpu":
            raise DeviceUnavailable(f"ONNX Runtime {runtime.__version__} cannot use {device}: {error}") from error
        raise BundleError(f"ONNX Runtime {runtime.__version__} cannot load {model}: {error}") from error
    session.disable_fallback()
    check_providers(device, session.get_providers())
    check_signature(
        model,
        {entry.name: entry.type for entry in session.get_inputs()},
        {entry.name: entry.type for entry in session.get_outputs()},
    )
    return OrtSession(session, device=device)


def _register(options: Any, kernels: ChosenSet, threads: int | None, version: str) -> None:
    """Register the library for a session, and choose its instruction set and threads.

    The choice is for the session that this thread opens next.
    """
    try:
        native = NativeLibrary(kernels.path)
        native.choose(kernels.instruction_set, threads)
        before = native.registrations
        options.register_custom_ops_library(str(kernels.path))
        if native.registrations == before:  # where the library found no function to make an error with
            raise OSError("they do not know its interface")
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        if is_callers(error):
            raise
        raise InstallationError(
            f"ONNX Runtime {version} refuses the kernels of {kernels.path} ({error}); install cappy-engine again, or "
            "set CAPPY_KERNELS=none, which is slower"
        ) from error


def give_memory_back() -> None:
    """Give freed memory, which glibc keeps, back to the system. It takes some 10 ms.

    >>> give_memory_back()
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError) as error:  # another C library, another system
        if is_callers(error):
            raise


def load_runtime() -> Any:
    """Import ONNX Runtime. Raises InstallationError unless exactly one of its packages is installed."""
    installed = list(installed_packages())
    if len(installed) > 1:
        raise InstallationError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files; "
            f"run 'pip uninstall -y {' '.join(installed)}', then install one of them: {install_hint('cpu')} (or [gpu])"
        )
    try:
        import onnxruntime
    except ImportError as error:
        if error.__cause__ and is_callers(error.__cause__):  # it came while the C part was imported
            raise error.__cause__ from None
        raise InstallationError(
            f"ONNX Runtime cannot be imported ({error}); {install_hint('cpu')} (on a machine with a GPU, [gpu])"
        ) from error
    return onnxruntime


def installed_packages() -> dict[str, str]:
    """Find the installed packages of ONNX Runtime, with their versions."""
    found = {}
    for name in RUNTIME_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_device(device: str, available: Sequence[str], version: str) -> str:
    """Find the provider for `device`. Raises DeviceUnavailable if this ONNX Runtime has none, ValueError for others."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose from auto, {', '.join(DEVICES)}")
    provider = PROVIDERS[device]
    if provider not in available:
        raise DeviceUnavailable(
            f"device {device!r} needs {provider}, and this ONNX Runtime {version} has only {', '.join(available)}; "
            f"use device='cpu', or uninstall onnxruntime; then, {install_hint('gpu')}"
        )
    return provider


def check_providers(device: str, registered: Sequence[str]) -> None:
    """Raise DeviceUnavailable if a session that was opened for `device` came up without it."""
    if PROVIDERS[device] not in registered:
        raise DeviceUnavailable(
            f"device {device!r} was asked for, but ONNX Runtime came up with {', '.join(registered)}: the driver or "
            "its libraries (CUDA, cuDNN) are missing or too old; run with device='cpu', or mend the installation"
        )


def check_signature(model: Path, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Raise BundleError unless the model takes token arrays by the usual names and gives `logits`.

    `inputs` and `outputs` are ONNX Runtime's types by name.
    """
    unknown = [name for name in inputs if name not in INPUTS]
    if unknown or "input_ids" not in inputs or "logits" not in outputs:
        raise BundleError(
            f"{model} takes {list(inputs)} and gives {list(outputs)}; a bundle's model takes {INPUTS} and gives logits"
        )
    if set(inputs.values()) != {"tensor(int64)"} or outputs["logits"] not in ("tensor(float)", "tensor(float16)"):
        raise BundleError(
            f"{model} takes {dict(inputs)} and gives logits as {outputs['logits']}; a bundle's model takes "
            "tensor(int64) and gives tensor(float) or tensor(float16); export the bundle again"
        )
