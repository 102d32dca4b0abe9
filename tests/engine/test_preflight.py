"""What a device needs: every cause is named with its fix, on made-up installations, and on this machine as it is."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.errors import DeviceUnavailable, InstallationError, install_hint
from cappy_engine.gpu.installation import (
    TENSORRT_LIBRARIES,
    Gpu,
    Installation,
    find_missing,
    inspect_installation,
    library_needs,
    needed_libraries,
    preload_tensorrt,
    read_driver,
    tensorrt_folder,
)
from cappy_engine.gpu.preflight import (
    Finding,
    cuda_major,
    describe,
    diagnose,
    require_device,
)
from cappy_engine.session import PROVIDERS, installed_packages

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


def changed(**changes: Any) -> Installation:
    return dataclasses.replace(GOOD, **changes)


def problems(installation: Installation, device: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose(installation, device) if not finding.is_ok}


def findings_of(installation: Installation) -> dict[str, list[Finding]]:
    return {device: diagnose(installation, device) for device in DEVICES}


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
            changed(gpus=(V100,)), "cuda", "compute capability", r"7\.0 \(Tesla V100\), and CUDA 13 dropped .*7\.5",
            r"7\.5 or higher, or device='cpu'$",
        ),
        (
            changed(gpus=(V100,), needed_libraries=NEEDED_12, driver="12.8"), "tensorrt", "compute capability",
            r"TensorRT 10 needs 7\.5$", r"7\.5 or higher",
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


def test_a_gpu_older_than_tensor_cores_runs_with_cuda_12_and_is_told_of_fp16() -> None:
    installation = changed(gpus=(P100,), needed_libraries=NEEDED_12, driver="12.8")
    assert not problems(installation, "cuda")
    (finding,) = (finding for finding in diagnose(installation, "cuda") if finding.name == "compute capability")
    assert finding.detail == "6.0: no tensor cores for fp16, which start at 7.0"


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
        (dataclasses.replace(CPU_PACKAGE, missing_libraries={CUDA: ("libcudart.so.14",)}), 14),
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


@pytest.mark.parametrize("installation", [NOTHING, CPU_PACKAGE, BARE])
def test_the_cpu_needs_nothing(installation: Installation) -> None:
    require_device(installation, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_packages_that_clash_are_refused_for_every_device(device: str) -> None:
    with pytest.raises(InstallationError, match=r"^onnxruntime and onnxruntime-gpu are both .*; run: pip uninstall -y"):
        require_device(CLASH, device)


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


# Libraries


def elf(*needed: str) -> bytes:
    """A 64-bit ELF file without sections: headers, a dynamic section at 0x100 and its strings, mapped at 0x400000."""
    strings, offsets = b"\0", []
    for name in needed:
        offsets.append(len(strings))
        strings += name.encode() + b"\0"
    table = 0x100 + 16 * (len(needed) + 3)
    entries = [*((1, offset) for offset in offsets), (14, 0), (5, 0x400000 + table), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    size = table + len(strings)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, 0x1000)
    where = struct.pack("<IIQQQQQQ", 2, 6, 0x100, 0x400100, 0x400100, len(dynamic), len(dynamic), 8)
    return (header + load + where).ljust(0x100, b"\0") + dynamic + strings


def fake_load(*found: str) -> Callable[[str], object]:
    """A loader that finds these libraries and no others."""

    def load(name: str) -> object:
        if name not in found:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return object()

    return load


@pytest.mark.parametrize("needed", [(), ("libcudart.so.13",), NEEDED[TENSORRT]])
def test_needed_libraries_are_read_in_their_order(needed: tuple[str, ...]) -> None:
    assert needed_libraries(elf(*needed)) == needed


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_needed_libraries_of_a_real_library_are_those_that_readelf_prints() -> None:
    folder = Path(onnxruntime.__file__).parent / "capi"
    for path in (Path(sys.executable).resolve(), *folder.glob("*.so*")):
        printed = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
        expected = tuple(re.findall(r"\(NEEDED\).*\[(.+)\]", printed))
        assert needed_libraries(path.read_bytes()) == expected
        assert any(name.startswith("libc.") for name in expected)


@pytest.mark.parametrize("image", [b"", b"\x7fELF", b"MZ" + bytes(200), b"\x7fELF\x01\x01" + bytes(200), b"#!/bin/sh"])
def test_what_is_no_elf_file_needs_nothing(image: bytes) -> None:
    assert needed_libraries(image) == ()


@given(length=st.integers(0, 400))
def test_a_file_that_is_cut_short_is_read_without_an_error(length: int) -> None:
    names = needed_libraries(elf("libcudart.so.13", "libcublas.so.13")[:length])
    assert len(names) in (0, 2)


@given(rest=st.binary(max_size=300))
def test_any_bytes_after_the_magic_number_are_read_without_an_error(rest: bytes) -> None:
    assert isinstance(needed_libraries(b"\x7fELF\x02\x01" + rest), tuple)


@given(place=st.integers(16, 300), value=st.integers(0, 2**64 - 1))
def test_any_offset_is_read_without_an_error(place: int, value: int) -> None:
    image = bytearray(elf("libcudart.so.13").ljust(400, b"\0"))
    struct.pack_into("<Q", image, place, value)
    assert isinstance(needed_libraries(bytes(image)), tuple)


def test_the_needs_of_provider_libraries_leave_out_what_every_system_has(tmp_path: Path) -> None:
    system = ("libdl.so.2", "librt.so.1", "libpthread.so.0", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1")
    own = ("libc.so.6", "ld-linux-x86-64.so.2", "libonnxruntime_providers_shared.so", "libcuda.so.1")
    (tmp_path / CUDA).write_bytes(elf(*NEEDED[CUDA], *system, *own))
    (tmp_path / TENSORRT).write_bytes(elf(*system, *NEEDED[TENSORRT]))
    assert library_needs(tmp_path, "tensorrt") == NEEDED
    assert library_needs(tmp_path, "cuda") == {CUDA: NEEDED[CUDA]}
    assert library_needs(tmp_path, "cpu") == {}


def test_provider_libraries_that_are_absent_or_empty_have_no_needs(tmp_path: Path) -> None:
    (tmp_path / CUDA).write_bytes(b"")
    assert library_needs(tmp_path, "tensorrt") == {}


def test_missing_libraries_are_those_that_do_not_load() -> None:
    assert find_missing(NEEDED, fake_load("libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13")) == {
        CUDA: ("libcurand.so.10",),
        TENSORRT: ("libnvinfer.so.10", "libnvonnxparser.so.10", "libcudnn.so.9"),
    }
    assert find_missing(NEEDED, lambda name: None) == {}


def test_preloading_tensorrt_from_a_folder_without_it_does_nothing(tmp_path: Path) -> None:
    (tmp_path / TENSORRT_LIBRARIES[0]).write_bytes(b"no library")
    preload_tensorrt(tmp_path)
    preload_tensorrt(tmp_path / "absent")


def test_the_folder_of_tensorrt_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tensorrt_folder() is None
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tensorrt_folder() == tmp_path / "tensorrt_libs"


# The driver


def put(value: int) -> Callable[..., int]:
    """A function of the driver that writes `value` where its first argument points to."""

    def function(target: Any, *_: object) -> int:
        target._obj.value = value
        return 0

    return function


def fake_cuda(gpus: Sequence[Gpu], **functions: Callable[..., int]) -> Callable[[str], object]:
    """A loader of a libcuda.so.1 with these GPUs; any of its functions can be replaced."""

    def name_of(target: Any, size: int, device: Any) -> int:
        target.value = gpus[device.value].name.encode()[: size - 1]
        return 0

    def attribute_of(target: Any, attribute: int, device: Any) -> int:
        target._obj.value = int(gpus[device.value].compute_capability.split(".")[attribute - 75])
        return 0

    def get(target: Any, ordinal: int) -> int:
        target._obj.value = ordinal
        return 0

    def memory_of(target: Any, device: Any) -> int:
        target._obj.value = gpus[device.value].memory_bytes
        return 0

    def error_name(code: int, target: Any) -> int:
        target._obj.value = {100: b"CUDA_ERROR_NO_DEVICE"}.get(code)
        return 0

    cuda: dict[str, Callable[..., int]] = {
        "cuInit": lambda flags: 0,
        "cuDriverGetVersion": put(13010),
        "cuDeviceGetCount": put(len(gpus)),
        "cuDeviceGet": get,
        "cuDeviceGetName": name_of,
        "cuDeviceGetAttribute": attribute_of,
        "cuDeviceTotalMem_v2": memory_of,
        "cuGetErrorName": error_name,
    }
    library = SimpleNamespace(**{**cuda, **functions})
    return lambda name: library if name == "libcuda.so.1" else fake_load()(name)


def test_the_driver_tells_its_version_and_every_gpu() -> None:
    driver = read_driver(fake_cuda([H100, V100]))
    assert (driver.version, driver.problem) == ("13.1", None)
    assert driver.gpus == (H100, V100)


@pytest.mark.parametrize(("code", "name"), [(100, "CUDA_ERROR_NO_DEVICE"), (999, "error 999")])
def test_a_driver_that_refuses_tells_its_version_and_why(code: int, name: str) -> None:
    driver = read_driver(fake_cuda([H100], cuInit=lambda flags: code))
    assert (driver.version, driver.problem, driver.gpus) == ("13.1", f"cuInit failed with {name}", ())


def test_a_library_of_the_name_without_the_functions_is_a_problem() -> None:
    driver = read_driver(lambda name: SimpleNamespace())
    assert driver.version is None
    assert "cuDriverGetVersion" in str(driver.problem)


def test_without_a_driver_the_message_of_the_loader_is_the_problem() -> None:
    assert read_driver(fake_load()).problem == NO_DRIVER


# This machine


def test_an_installation_is_inspected_with_what_it_is_given() -> None:
    installation = inspect_installation(
        available_providers=lambda: ["A", "B"], preload=lambda: None, load=fake_cuda([H100])
    )
    assert installation.providers == ("A", "B")
    assert (installation.driver, installation.gpus) == ("13.1", (H100,))
    assert installation.runtime_packages == installed_packages()
    assert installation.onnxruntime in installation.runtime_packages.values()


def test_inspecting_raises_nothing_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> list[str]:
        raise ImportError("libonnxruntime.so: file too short")

    def complain() -> None:
        sys.stdout.write("Failed to load libcublas.so.13")  # as preload_dlls does, to where scores are printed
        raise RuntimeError("Invalid parameter")

    installation = inspect_installation(available_providers=fail, preload=complain, load=fake_load())
    assert installation.providers == ()
    assert installation.driver_problem == NO_DRIVER
    assert capsys.readouterr().out == ""


def test_this_machine_is_inspected_as_it_is() -> None:
    installation = inspect_installation(
        available_providers=onnxruntime.get_available_providers, preload=onnxruntime.preload_dlls
    )
    assert installation.onnxruntime == onnxruntime.__version__
    assert not problems(installation, "cpu")
    describe(findings_of(installation), installation)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert installation.driver is None
        assert "libcuda.so.1" in str(installation.driver_problem)
        assert auto_line(installation).startswith("auto takes cpu")
        for device in GPU_DEVICES:
            with pytest.raises(DeviceUnavailable, match=r"driver: libcuda\.so\.1"):
                require_device(installation, device)
    else:
        assert installation.driver is not None


def test_the_gpus_that_are_to_be_used_are_judged() -> None:
    mixed = changed(gpus=(Gpu("Tesla P100", "6.0", 2**34), Gpu("NVIDIA L4", "8.9", 2**34)))
    assert not all(finding.is_ok for finding in diagnose(mixed, "cuda"))
    assert all(finding.is_ok for finding in diagnose(mixed, "cuda", [1]))
    assert not all(finding.is_ok for finding in diagnose(mixed, "cuda", [1, 0]))
    require_device(mixed, "cuda", [1])
