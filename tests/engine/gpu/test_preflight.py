"""What a device needs: every cause is named with its fix, on made-up installations."""

from __future__ import annotations

import dataclasses
import re

import pytest

from cappy_engine.errors import DeviceUnavailable
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.gpu.preflight import cuda_major, describe, diagnose, require_device
from tests.support.installations import (
    BARE,
    CLASH,
    CPU_PACKAGE,
    CUDA,
    DEVICES,
    GOOD,
    GPU_DEVICES,
    H100,
    INSTALL_CPU,
    INSTALL_GPU,
    L4,
    NEEDED_12,
    NO_DRIVER,
    NOTHING,
    P100,
    TENSORRT,
    V100,
    changed,
    findings_of,
    problems,
)

# Findings


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_wrong_where_everything_is_there(device: str) -> None:
    findings = diagnose(GOOD, device)
    assert all(finding.is_ok and not finding.fix and finding.detail for finding in findings)
    require_device(GOOD, device)


def test_each_device_has_its_findings_in_the_order_of_mending() -> None:
    common = ["package", "provider"]
    gpu = [*common, "driver", "GPU", "compute capability", "CUDA", "cuDNN"]
    names = {device: [finding.name for finding in rows] for device, rows in findings_of(GOOD).items()}
    assert names == {"cpu": common, "cuda": gpu, "tensorrt": [*gpu, "TensorRT"]}


@pytest.mark.parametrize(
    ("installation", "device", "name", "detail", "fix"),
    [
        (NOTHING, "cpu", "package", r"not installed", INSTALL_CPU),
        (NOTHING, "cuda", "package", r"not installed", INSTALL_GPU),
        (
            CLASH, "cuda", "package", r"onnxruntime and onnxruntime-gpu are both installed",
            "^pip uninstall -y onnxruntime onnxruntime-gpu; then, " + INSTALL_GPU,
        ),
        (CLASH, "cpu", "package", r"both installed", "; then, " + INSTALL_CPU),
        (
            CPU_PACKAGE, "cuda", "provider", r"^no CUDAExecutionProvider: .* lists CPUExecutionProvider$",
            "^pip uninstall -y onnxruntime; then, " + INSTALL_GPU,
        ),
        (CPU_PACKAGE, "tensorrt", "provider", r"no TensorrtExecutionProvider", INSTALL_GPU),
        (
            changed(providers=("CPUExecutionProvider",)), "cuda", "provider", r"no CUDAExecutionProvider",
            r"^pip install --force-reinstall --no-deps onnxruntime-gpu$",
        ),
        (
            dataclasses.replace(CPU_PACKAGE, providers=()), "cpu", "provider", r"lists no provider at all$",
            r"^pip install --force-reinstall --no-deps onnxruntime$",
        ),
        (BARE, "cuda", "driver", re.escape(NO_DRIVER), r"^install the NVIDIA driver 580 or newer; .* --gpus all$"),
        (
            changed(driver="12.9"), "cuda", "driver", r"supports CUDA 12\.9, and this ONNX Runtime needs CUDA 13",
            r"^install the NVIDIA driver 580 or newer$",
        ),
        (
            changed(driver="11.4", needed_libraries=NEEDED_12), "tensorrt", "driver", r"needs CUDA 12$",
            r"driver 525 or newer$",
        ),
        (changed(gpus=()), "cuda", "GPU", r"the driver finds no GPU", r"nvidia-smi.*CUDA_VISIBLE_DEVICES"),
        (
            changed(gpus=(), driver_problem="cuInit failed with CUDA_ERROR_NO_DEVICE"), "cuda", "GPU",
            r"CUDA_ERROR_NO_DEVICE", r"nvidia-smi",
        ),
        (BARE, "tensorrt", "GPU", r"without a driver", r"install the driver first"),
        (
            changed(gpus=(V100,)), "cuda", "compute capability", r"7\.0 \(Tesla V100\), and CUDA 13 .* dropped .*7\.5",
            r"7\.5 or higher, or device='cpu'$",
        ),
        (
            changed(gpus=(P100, L4)), "cuda", "compute capability", r"Tesla P100",
            r"^choose the NVIDIA L4, by its number",
        ),
        (
            changed(missing_libraries={CUDA: ("libcublas.so.13", "libcurand.so.10")}), "cuda", "CUDA",
            r"the loader cannot find libcublas\.so\.13, libcurand\.so\.10$", INSTALL_GPU,
        ),
        (
            changed(missing_libraries={CUDA: ("libcudnn.so.9",)}), "cuda", "cuDNN", r"find libcudnn\.so\.9$",
            INSTALL_GPU,
        ),
        (
            changed(missing_libraries={TENSORRT: ("libcudnn.so.9",)}), "tensorrt", "cuDNN", r"libcudnn\.so\.9",
            INSTALL_GPU,
        ),
        (
            changed(missing_libraries={TENSORRT: ("libnvinfer.so.10", "libnvonnxparser.so.10")}), "tensorrt",
            "TensorRT", r"find libnvinfer\.so\.10, libnvonnxparser\.so\.10; TensorRT 11",
            r"^pip install 'tensorrt-cu13<11'$",
        ),
        (
            changed(missing_libraries={TENSORRT: ("libnvinfer.so.10",)}, needed_libraries=NEEDED_12), "tensorrt",
            "TensorRT", r"libnvinfer\.so\.10", r"^pip install 'tensorrt-cu12<11'$",
        ),
        (
            changed(missing_libraries={TENSORRT: ("libnvinfer.so.10",)}, other_versions=("libnvinfer.so.11",)),
            "tensorrt", "TensorRT", r"find libnvinfer\.so\.10; it finds libnvinfer\.so\.11, but .* TensorRT 10 only$",
            r"^pip install 'tensorrt-cu13<11'$",
        ),
        (
            changed(missing_libraries={CUDA: ("libcudart.so.13",)}, other_versions=("libcudart.so.12",)), "cuda",
            "CUDA", r"find libcudart\.so\.13; it finds libcudart\.so\.12, but .* CUDA 13 only$", INSTALL_GPU,
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_fix(
    installation: Installation, device: str, name: str, detail: str, fix: str
) -> None:
    finding = problems(installation, device)[name]
    assert re.search(detail, finding.detail)
    assert re.search(fix, finding.fix)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("installation", [NOTHING, CPU_PACKAGE, BARE, CLASH, changed(gpus=(P100,), driver="12.1")])
def test_every_problem_has_a_detail_and_a_fix_on_one_line(installation: Installation, device: str) -> None:
    for finding in diagnose(installation, device):
        assert finding.detail
        assert "\n" not in finding.detail + finding.fix
        assert bool(finding.fix) is not finding.is_ok


@pytest.mark.parametrize(
    ("installation", "device", "wrong"),
    [
        (NOTHING, "cpu", ["package", "provider"]),
        (CPU_PACKAGE, "cpu", []),
        (CPU_PACKAGE, "cuda", ["provider", "driver", "GPU"]),
        (BARE, "cpu", []),
        (BARE, "cuda", ["driver", "GPU", "CUDA"]),
        (BARE, "tensorrt", ["driver", "GPU", "CUDA", "cuDNN", "TensorRT"]),
        (changed(missing_libraries={TENSORRT: ("libnvinfer.so.10",)}), "cuda", []),
        (changed(providers=("CUDAExecutionProvider",)), "cuda", []),
        (changed(providers=("CUDAExecutionProvider",)), "tensorrt", ["provider"]),
    ],
)
def test_only_what_the_device_needs_is_wrong(installation: Installation, device: str, wrong: list[str]) -> None:
    assert list(problems(installation, device)) == wrong


@pytest.mark.parametrize("driver", ["13.0", "13.5", "14.0"])
def test_only_the_major_version_of_cuda_decides_on_the_driver(driver: str) -> None:
    assert not problems(changed(driver=driver), "cuda")


def test_several_gpus_are_counted_and_the_first_is_described() -> None:
    (finding,) = (finding for finding in diagnose(changed(gpus=(H100, L4)), "cuda") if finding.name == "GPU")
    assert finding.detail.startswith("NVIDIA H100, compute capability 9.0, 80 GiB, and 1 more; its speed is measured")


def test_onnx_runtime_that_pip_did_not_install_is_one() -> None:
    assert not problems(changed(runtime_packages={}), "cuda")


@pytest.mark.parametrize(
    ("installation", "major"),
    [
        (GOOD, 13),
        (changed(needed_libraries=NEEDED_12), 12),
        (CPU_PACKAGE, None),
    ],
)
def test_the_major_version_of_cuda_is_that_of_its_runtime_library(
    installation: Installation, major: int | None
) -> None:
    assert cuda_major(installation) == major


# Requiring a device


@pytest.mark.parametrize("device", GPU_DEVICES)
@pytest.mark.parametrize("installation", [NOTHING, CPU_PACKAGE, BARE, changed(gpus=(P100,), driver="12.1")])
def test_the_error_names_every_cause_and_every_fix(installation: Installation, device: str) -> None:
    lacking = problems(installation, device).values()
    with pytest.raises(DeviceUnavailable, match=rf"^device '{device}' cannot be used here:\n") as caught:
        require_device(installation, device)
    for finding in lacking:
        assert f"{finding.name}: {finding.detail}\n    fix: {finding.fix}" in str(caught.value)
    assert str(caught.value).count("fix:") == len(lacking)


# What auto takes, and the text for people


def auto_line(installation: Installation) -> str:
    return describe(findings_of(installation), installation).splitlines()[-1]


def test_auto_takes_cuda_where_it_can_be_used() -> None:
    assert auto_line(GOOD) == "auto takes cuda: everything that it needs is there"


def test_auto_takes_the_cpu_and_names_every_cause_on_one_line() -> None:
    line = auto_line(BARE)
    assert line.startswith(f"auto takes cpu: cuda cannot be used (driver: {NO_DRIVER}; GPU: ")
    assert "libcublas.so.13" in line


def test_the_text_has_a_section_for_each_device_and_a_fix_below_what_is_missing() -> None:
    lines = describe(findings_of(BARE), BARE).splitlines()
    assert [line for line in lines if line in DEVICES] == list(DEVICES)
    assert lines[0] == "ONNX Runtime  onnxruntime-gpu 1.31.1"
    for place, line in enumerate(lines):
        if line.startswith("  MISSING"):
            assert lines[place + 1].strip().startswith("fix: ")
    cuda = lines[lines.index("cuda") : lines.index("tensorrt")]
    assert [line.split()[:2] for line in cuda if line.startswith("  ") and "fix:" not in line] == [
        ["ok", "package"],
        ["ok", "provider"],
        ["MISSING", "driver"],
        ["MISSING", "GPU"],
        ["MISSING", "CUDA"],
        ["ok", "cuDNN"],
    ]
    assert lines[-1].startswith("auto takes cpu: ")


def test_the_text_names_gpus_and_ends_with_what_auto_takes() -> None:
    lines = describe(findings_of(GOOD), GOOD).splitlines()
    assert "GPU 0         NVIDIA H100, compute capability 9.0, 80 GiB" in lines
    assert "driver        CUDA 13.0" in lines
    assert not any("MISSING" in line or "fix:" in line for line in lines)
    assert lines[-1] == "auto takes cuda: everything that it needs is there"


@pytest.mark.parametrize("installation", [NOTHING, CLASH])
def test_auto_takes_nothing_without_a_working_onnx_runtime(installation: Installation) -> None:
    last = describe(findings_of(installation), installation).splitlines()[-1]
    assert last.startswith("auto cannot take cpu either: package: ")


def test_the_gpus_that_are_to_be_used_are_judged() -> None:
    mixed = changed(gpus=(Gpu("Tesla P100", "6.0", 2**34), Gpu("NVIDIA L4", "8.9", 2**34)))
    assert not all(finding.is_ok for finding in diagnose(mixed, "cuda"))
    assert all(finding.is_ok for finding in diagnose(mixed, "cuda", [1]))
    assert not all(finding.is_ok for finding in diagnose(mixed, "cuda", [1, 0]))
    require_device(mixed, "cuda", [1])
