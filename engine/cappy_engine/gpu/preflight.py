"""Judge whether everything is there that a device needs, from an `Installation` alone. Pure.

ONNX Runtime lists CUDA and TensorRT wherever onnxruntime-gpu is installed, so its word proves nothing. Knows nothing of
models: that a session really opens is proven by opening it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cappy_engine.errors import DeviceUnavailable, install_hint
from cappy_engine.gpu.installation import PROVIDER_LIBRARIES, Gpu, Installation
from cappy_engine.session import PROVIDERS

FAMILIES: Mapping[str, tuple[str, ...]] = {"cuda": ("CUDA", "cuDNN"), "tensorrt": ("CUDA", "cuDNN", "TensorRT")}
"""The kinds of libraries that a device needs; each is a finding."""
MIN_DRIVERS = {12: "525", 13: "580"}
"""The oldest NVIDIA driver for any minor version of a CUDA (NVIDIA's "Minor Version Compatibility", table 1)."""

MIN_CAPABILITY = (7, 5)
"""Of CUDA 13, which this onnxruntime-gpu needs, and of TensorRT since 10.5 (their release notes)."""


@dataclass(frozen=True)
class Finding:
    """One thing that a device needs: whether it is there, and what to do if it is not."""

    name: str
    is_ok: bool
    detail: str
    fix: str = ""


def diagnose(installation: Installation, device: str, gpus: Sequence[int] = (0,)) -> list[Finding]:
    """List what `device` ("cpu", "cuda" or "tensorrt") needs, one finding for each; a missing one has a fix.

    `gpus` are the numbers of the GPUs that are to be used; numbers that do not exist are not looked at.
    """
    findings = [_package(installation, device), _provider(installation, device)]
    if device != "cpu":
        findings += [_driver(installation), _gpu(installation)]
        used = [installation.gpus[number] for number in gpus if 0 <= number < len(installation.gpus)]
        findings += [_compute_capability(installation, gpu) for gpu in used]
        findings += [found for family in FAMILIES[device] if (found := _libraries(installation, device, family))]
    return findings


def require_device(installation: Installation, device: str, gpus: Sequence[int] = (0,)) -> None:
    """Raise DeviceUnavailable, with every cause and its fix, unless all is there that `device` needs."""
    lacking = [finding for finding in diagnose(installation, device, gpus) if not finding.is_ok]
    if lacking:
        lines = [f"  {finding.name}: {finding.detail}\n    fix: {finding.fix}" for finding in lacking]
        raise DeviceUnavailable("\n".join([f"device {device!r} cannot be used here:", *lines]))


def describe(findings: Mapping[str, Sequence[Finding]], installation: Installation) -> str:
    """Write the findings of every device as text, with fixes, and what "auto" would take."""
    packages = ", ".join(f"{name} {version}" for name, version in installation.runtime_packages.items())
    driver = f"CUDA {installation.driver}" if installation.driver else "none"
    lines = [
        f"ONNX Runtime  {packages or 'no package'}",
        f"lists         {', '.join(installation.providers) or 'nothing'} (which proves nothing)",
        f"driver        {driver}",
        *(f"{f'GPU {number}':<12}  {_gpu_text(gpu)}" for number, gpu in enumerate(installation.gpus)),
    ]
    width = max(len(finding.name) for rows in findings.values() for finding in rows)
    for device, rows in findings.items():
        lines += ["", device]
        for finding in rows:
            lines.append(f"  {'ok' if finding.is_ok else 'MISSING':<7}  {finding.name:<{width}}  {finding.detail}")
            lines += [] if finding.is_ok else [f"  {'':<7}  {'':<{width}}  fix: {finding.fix}"]
    return "\n".join([*lines, "", _choice(findings)])


def _choice(findings: Mapping[str, Sequence[Finding]]) -> str:
    """Say what device "auto" takes. Never TensorRT: it builds engines for minutes first, and must be asked for."""
    lacking = [finding for finding in findings["cuda"] if not finding.is_ok]
    if not lacking:
        return "auto takes cuda: everything that it needs is there"
    broken = [finding for finding in findings.get("cpu", ()) if not finding.is_ok]
    if broken:
        return f"auto cannot take cpu either: {_causes(broken)}"
    return f"auto takes cpu: cuda cannot be used ({_causes(lacking)})"


def cuda_major(installation: Installation) -> int | None:
    """Find the major version of CUDA that the providers are linked with; None if they are not installed."""
    linked = _of_device(installation.needed_libraries, "tensorrt")
    found = (re.fullmatch(r"libcudart\.so\.(\d+)", library) for library in linked)
    return next((int(match[1]) for match in found if match), None)


def _package(installation: Installation, device: str) -> Finding:
    name, extra = "package", "cpu" if device == "cpu" else "gpu"
    names = list(installation.runtime_packages)
    if len(names) > 1:
        return Finding(
            name,
            False,
            f"{' and '.join(names)} are both installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(names)}; then, {install_hint(extra)}",
        )
    if names:
        return Finding(name, True, f"{names[0]} {installation.runtime_packages[names[0]]}")
    if installation.providers:
        return Finding(name, True, "none of pip's, but ONNX Runtime can be imported")
    return Finding(name, False, "ONNX Runtime is not installed", install_hint(extra))


def _provider(installation: Installation, device: str) -> Finding:
    provider, packages = PROVIDERS[device], installation.runtime_packages
    if provider in installation.providers:
        return Finding("provider", True, provider)
    detail = f"no {provider}: ONNX Runtime lists {', '.join(installation.providers) or 'no provider at all'}"
    for package in packages:
        if device == "cpu" or package == "onnxruntime-gpu":
            # Uninstalling another package takes files of this one with it (microsoft/onnxruntime #26996).
            return Finding("provider", False, detail, f"pip install --force-reinstall --no-deps {package}")
    uninstall = f"pip uninstall -y {' '.join(packages)}; then, " if packages else ""
    return Finding("provider", False, detail, uninstall + install_hint("cpu" if device == "cpu" else "gpu"))


def _driver(installation: Installation) -> Finding:
    major = cuda_major(installation)
    wanted = f"NVIDIA driver{f' {MIN_DRIVERS[major]} or newer' if major in MIN_DRIVERS else ''}"
    if installation.driver is None:
        return Finding(
            "driver",
            False,
            installation.driver_problem or "there is no CUDA driver",
            f"install the {wanted}; a container sees the host's if it is started with --gpus all",
        )
    if major is not None and int(installation.driver.split(".")[0]) < major:
        # Only the major version counts: within it, libraries run on the driver of any minor version.
        detail = f"the driver supports CUDA {installation.driver}, and this ONNX Runtime needs CUDA {major}"
        return Finding("driver", False, detail, f"install the {wanted}")
    return Finding("driver", True, f"supports CUDA {installation.driver}")


def _gpu(installation: Installation) -> Finding:
    if installation.driver is None:
        return Finding("GPU", False, "none can be found without a driver", "install the driver first")
    if not installation.gpus:
        return Finding(
            "GPU",
            False,
            installation.driver_problem or "the driver finds no GPU",
            "see whether nvidia-smi lists one; unset CUDA_VISIBLE_DEVICES if it hides it, and start a container with "
            "--gpus all",
        )
    others = f", and {len(installation.gpus) - 1} more" if len(installation.gpus) > 1 else ""
    return Finding("GPU", True, f"{_gpu_text(installation.gpus[0])}{others}; its speed is measured when a model opens")


def _compute_capability(installation: Installation, gpu: Gpu) -> Finding:
    name = "compute capability"
    if _capability(gpu) >= MIN_CAPABILITY:
        return Finding(name, True, gpu.compute_capability)
    least = ".".join(map(str, MIN_CAPABILITY))
    others = [other for other in installation.gpus if _capability(other) >= MIN_CAPABILITY]
    fix = (
        f"choose the {others[0].name}, by its number (--gpu) or with CUDA_VISIBLE_DEVICES"
        if others
        else f"use a GPU of compute capability {least} or higher, or device='cpu'"
    )
    reason = f"CUDA 13 and TensorRT 10 dropped GPUs below {least}"
    return Finding(name, False, f"{gpu.compute_capability} ({gpu.name}), and {reason}", fix)


def _libraries(installation: Installation, device: str, family: str) -> Finding | None:
    """None where there is no provider whose needs could be told: that there is none is a finding already."""
    missing = _of_device(installation.missing_libraries, device)
    linked = _of_device(installation.needed_libraries, device)
    lacking = [library for library in missing if _family(library) == family]
    present = [library for library in linked if _family(library) == family]
    major, detail = cuda_major(installation), f"the loader cannot find {', '.join(lacking)}"
    others = [library for library in installation.other_versions if _family(library) == family]
    if lacking and family == "TensorRT":
        versions = [int(match[1]) for library in lacking if (match := re.search(r"\.so\.(\d+)$", library))]
        wanted = max(versions, default=10)
        reason = f"TensorRT {wanted + 1}, which pip would take, has other ones"
        if others:
            reason = f"it finds {', '.join(others)}, but this ONNX Runtime works with TensorRT {wanted} only"
        return Finding(family, False, f"{detail}; {reason}", f"pip install 'tensorrt-cu{major or 13}<{wanted + 1}'")
    if lacking:
        reason = f"; it finds {', '.join(others)}, but this ONNX Runtime is built for CUDA {major} only"
        return Finding(family, False, detail + (reason if others else ""), install_hint("gpu"))
    if present:
        return Finding(family, True, ", ".join(present))
    if linked and family == "cuDNN":  # optional for CUDA since microsoft/onnxruntime #29252
        return Finding(family, True, "not linked: ONNX Runtime loads it if an operator needs it")
    return None


def _of_device(libraries: Mapping[str, Sequence[str]], device: str) -> list[str]:
    """List the libraries that the provider libraries of `device` need, each once."""
    return list(dict.fromkeys(library for name in PROVIDER_LIBRARIES[device] for library in libraries.get(name, ())))


def _causes(findings: Sequence[Finding]) -> str:
    return "; ".join(f"{finding.name}: {finding.detail}" for finding in findings)


def _family(library: str) -> str:
    if library.startswith("libcudnn"):
        return "cuDNN"
    return "TensorRT" if library.startswith(("libnvinfer", "libnvonnxparser")) else "CUDA"


def _capability(gpu: Gpu) -> tuple[int, int]:
    major, _, minor = gpu.compute_capability.partition(".")
    return int(major), int(minor or 0)


def _gpu_text(gpu: Gpu) -> str:
    return f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 2**30:.0f} GiB"
