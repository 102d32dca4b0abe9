"""Made-up installations of ONNX Runtime, CUDA and TensorRT, good ones and broken ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest

from cappy_engine.errors import install_hint
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.gpu.preflight import Finding, diagnose
from cappy_engine.session import PROVIDERS

CUDA, TENSORRT = "libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so"
# As linked in onnxruntime-gpu 1.31.1, where CUDA's provider is not linked with cuDNN.
NEEDED = {
    CUDA: ("libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcudart.so.13"),
    TENSORRT: ("libcublas.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10", "libcudart.so.13", "libcudnn.so.9"),
}
NEEDED_12 = {name: tuple(library.replace(".13", ".12") for library in needed) for name, needed in NEEDED.items()}
H100, L4 = Gpu("NVIDIA H100", "9.0", 80 * 2**30), Gpu("NVIDIA L4", "8.9", 23 * 2**30)
V100, P100 = Gpu("Tesla V100", "7.0", 16 * 2**30), Gpu("Tesla P100", "6.0", 16 * 2**30)
NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"

GOOD = Installation(
    runtime_packages={"onnxruntime-gpu": "1.31.1"},
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    driver="13.0",
    driver_problem=None,
    gpus=(H100,),
    missing_libraries={},
    onnxruntime="1.31.1",
    needed_libraries=NEEDED,
)
CPU_PACKAGE = Installation(
    runtime_packages={"onnxruntime": "1.32.0"},
    providers=("CPUExecutionProvider",),
    driver=None,
    driver_problem=NO_DRIVER,
    gpus=(),
    missing_libraries={},
    onnxruntime="1.32.0",
    needed_libraries={},
)
NOTHING = dataclasses.replace(CPU_PACKAGE, runtime_packages={}, providers=(), onnxruntime=None)
BARE = dataclasses.replace(GOOD, driver=None, driver_problem=NO_DRIVER, gpus=(), missing_libraries=NEEDED)
"""onnxruntime-gpu on a machine that has nothing else."""
CLASH = dataclasses.replace(GOOD, runtime_packages={"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
DEVICES = tuple(PROVIDERS)
INSTALL_CPU, INSTALL_GPU = (re.escape(install_hint(extra)) + "$" for extra in ("cpu", "gpu"))
GPU_DEVICES = ("cuda", "tensorrt")


needs_cpu_package = pytest.mark.skipif(
    PROVIDERS["cuda"] in onnxruntime.get_available_providers(), reason="needs an ONNX Runtime without CUDA"
)


class PretendsToHaveGpus:
    """The real ONNX Runtime, but it lists providers where there are none, as onnxruntime-gpu does without a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return list(PROVIDERS.values())


def changed(**changes: Any) -> Installation:
    return dataclasses.replace(GOOD, **changes)


def problems(installation: Installation, device: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(installation, device) if not finding.is_ok}


def findings_of(installation: Installation) -> dict[str, list[Finding]]:
    return {device: diagnose(installation, device) for device in DEVICES}


def fake_load(*found: str) -> Callable[[str], object]:
    """A loader that finds these libraries and no others."""

    def load(name: str) -> object:
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return object()

    return load
