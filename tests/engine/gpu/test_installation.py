"""What is installed here: libraries, the driver and its GPUs, made up, and on this machine as it is."""

from __future__ import annotations

import ctypes
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

from cappy_engine.errors import DeviceUnavailable
from cappy_engine.gpu.installation import (
    TENSORRT_LIBRARIES,
    Gpu,
    find_missing,
    find_other_versions,
    inspect_installation,
    library_needs,
    needed_libraries,
    preload_tensorrt,
    read_driver,
    tensorrt_folder,
)
from cappy_engine.gpu.preflight import describe, require_device
from cappy_engine.session import installed_packages
from tests.support.installations import (
    CUDA,
    GPU_DEVICES,
    H100,
    NEEDED,
    NO_DRIVER,
    TENSORRT,
    V100,
    fake_load,
    findings_of,
    problems,
)

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


def test_libraries_of_another_version_are_found_beside_missing_ones(tmp_path: Path) -> None:
    missing = {CUDA: ("libcublas.so.13", "libcudart.so.13"), TENSORRT: ("libnvinfer.so.10", "libcudart.so.13")}
    load = fake_load("libcudart.so.12", "libcublas.so.12")
    assert find_other_versions(missing, load) == ("libcublas.so.12", "libcudart.so.12")
    (tmp_path / "libnvinfer.so.11").touch()  # where pip puts TensorRT, and the loader does not look
    assert find_other_versions(missing, load, tmp_path) == ("libcublas.so.12", "libcudart.so.12", "libnvinfer.so.11")
    assert find_other_versions({}, load, tmp_path) == ()


def test_missing_libraries_are_those_that_do_not_load() -> None:
    assert find_missing(NEEDED, fake_load("libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13")) == {
        CUDA: ("libcurand.so.10",),
        TENSORRT: ("libnvinfer.so.10", "libnvonnxparser.so.10", "libcudnn.so.9"),
    }
    assert find_missing(NEEDED, lambda name: None) == {}


def test_tensorrt_is_loaded_in_its_order_as_far_as_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libnvinfer_builder_resource.so.10").touch()
    asked: list[Path] = []

    def load(path: str, mode: int) -> None:
        asked.append(Path(path))
        raise OSError("no library")

    monkeypatch.setattr(ctypes, "CDLL", load)
    preload_tensorrt(tmp_path)
    assert asked == [tmp_path / name for name in (*TENSORRT_LIBRARIES, "libnvinfer_builder_resource.so.10")]


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


def with_runtime(monkeypatch: pytest.MonkeyPatch, **functions: Callable[[], object]) -> None:
    monkeypatch.setattr("cappy_engine.gpu.installation.load_runtime", lambda: SimpleNamespace(**functions))


def test_the_libraries_of_pip_are_loaded_before_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: set[str] = set()
    monkeypatch.setattr("cappy_engine.gpu.installation.library_needs", lambda folder, device: NEEDED)
    preload = {"preload_dlls": lambda: loaded.update(NEEDED[CUDA])}
    for functions, is_missing in ((preload, False), ({}, True)):  # an older ONNX Runtime does not load them
        loaded.clear()
        with_runtime(monkeypatch, get_available_providers=lambda: ["A"], **functions)
        found = inspect_installation(load=lambda name: fake_load(*loaded)(name))
        assert (CUDA in found.missing_libraries) == is_missing


def test_an_installation_is_inspected_with_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtime(monkeypatch, get_available_providers=lambda: ["A", "B"])
    installation = inspect_installation(load=fake_cuda([H100]))
    assert installation.providers == ("A", "B")
    assert (installation.driver, installation.gpus) == ("13.1", (H100,))
    assert installation.runtime_packages == installed_packages()
    assert installation.onnxruntime in installation.runtime_packages.values()


def test_inspecting_raises_nothing_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[str]:
        raise ImportError("libonnxruntime.so: file too short")

    def complain() -> None:
        sys.stdout.write("Failed to load libcublas.so.13")  # as preload_dlls does, to where scores are printed
        raise RuntimeError("Invalid parameter")

    with_runtime(monkeypatch, get_available_providers=fail, preload_dlls=complain)
    installation = inspect_installation(load=fake_load())
    assert installation.providers == ()
    assert installation.driver_problem == NO_DRIVER
    assert capsys.readouterr().out == ""


def test_this_machine_is_inspected_as_it_is() -> None:
    installation = inspect_installation()
    assert installation.onnxruntime == onnxruntime.__version__
    assert not problems(installation, "cpu")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert installation.driver is None
        assert "libcuda.so.1" in str(installation.driver_problem)
        assert describe(findings_of(installation), installation).splitlines()[-1].startswith("auto takes cpu")
        for device in GPU_DEVICES:
            with pytest.raises(DeviceUnavailable, match=r"driver: libcuda\.so\.1"):
                require_device(installation, device)
    else:
        assert installation.driver is not None
