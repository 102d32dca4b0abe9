"""Find what is installed on this machine for GPUs: packages, driver, devices and libraries.

Asks ONNX Runtime for its providers, the driver, and the loader for every library that the providers are linked with.
Decides nothing, and raises nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cappy_engine.session import installed_packages, load_runtime

PROVIDER_LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("libonnxruntime_providers_cuda.so",),
    "tensorrt": ("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so"),
}
"""What ONNX Runtime loads for a device; TensorRT's provider comes with CUDA's (microsoft/onnxruntime #22960)."""
TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")
"""In the order in which they need each other. The second is not linked, but opened by name."""
ALWAYS_THERE = (
    *("libc.", "libm.", "libdl.", "librt.", "libpthread.", "libstdc++.", "libgcc_s.", "ld-linux", "libonnxruntime"),
    "libcuda.so",  # the driver, which has a finding of its own
)
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute in cuda.h
PT_LOAD, PT_DYNAMIC, DT_NULL, DT_NEEDED, DT_STRTAB = 1, 2, 0, 1, 5  # elf(5)


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it; `compute_capability` is like "9.0"."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """The driver: the CUDA `version` that it supports, as "13.0" (None: no driver), its `problem`, and its GPUs."""

    version: str | None
    problem: str | None
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Installation:
    """Everything that is installed here. ONNX Runtime lists the `providers`, which proves nothing.

    `runtime_packages` maps packages of ONNX Runtime to versions, `onnxruntime` is the version of the first.
    `needed_libraries` maps a provider's library to what it is linked with, leaving out what every system has;
    `missing_libraries` to those of them that the loader cannot find; `other_versions` are libraries that it finds in
    another version than the missing ones: libcudart.so.12 where libcudart.so.13 is needed.
    """

    runtime_packages: Mapping[str, str]
    providers: tuple[str, ...]
    driver: str | None
    driver_problem: str | None
    gpus: tuple[Gpu, ...]
    missing_libraries: Mapping[str, tuple[str, ...]]
    onnxruntime: str | None
    needed_libraries: Mapping[str, tuple[str, ...]]
    other_versions: tuple[str, ...] = ()


def inspect_installation(*, device: str = "tensorrt", load: Callable[[str], Any] = ctypes.CDLL) -> Installation:
    """Gather all that `device` ("cuda" or "tensorrt") depends on. Never raises.

    It starts CUDA, and the libraries that it finds stay loaded. `providers` is empty if ONNX Runtime cannot be
    imported.
    """
    packages = installed_packages()
    providers: tuple[str, ...] = ()
    with contextlib.suppress(Exception):  # whatever a broken ONNX Runtime raises when it is imported
        providers = tuple(load_runtime().get_available_providers())
    folder = runtime_folder()
    needed = library_needs(folder, device) if folder else {}
    driver = read_driver(load)
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot load
        load_runtime().preload_dlls()  # CUDA and cuDNN from site-packages; older ones have no such function
    tensorrt = tensorrt_folder() if device == "tensorrt" else None
    if tensorrt:
        preload_tensorrt(tensorrt)
    missing = find_missing(needed, load)
    return Installation(
        runtime_packages=packages,
        providers=providers,
        driver=driver.version,
        driver_problem=driver.problem,
        gpus=driver.gpus,
        missing_libraries=missing,
        onnxruntime=next(iter(packages.values()), None),
        needed_libraries=needed,
        other_versions=find_other_versions(missing, load, tensorrt),
    )


def runtime_folder() -> Path | None:
    """Find the folder of ONNX Runtime's libraries, without importing it."""
    folder = _package_folder("onnxruntime")
    return folder / "capi" if folder else None


def tensorrt_folder() -> Path | None:
    """Find where pip put TensorRT's libraries, which the loader does not search; None if pip did not."""
    return _package_folder("tensorrt_libs")


def preload_tensorrt(folder: Path) -> None:
    """Load the TensorRT libraries in `folder`, so that TensorRT's provider finds them by name."""
    # The builder opens its resources by name when it first builds; its wheel's folder is not searched then.
    resources = sorted(folder.glob("libnvinfer_builder_resource*.so.*"))
    for path in (*(folder / name for name in TENSORRT_LIBRARIES), *resources):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def library_needs(folder: Path, device: str) -> dict[str, tuple[str, ...]]:
    """List the libraries that each provider library for `device` needs.

    Libraries that every system has are left out.
    """
    needs = {}
    for name in PROVIDER_LIBRARIES[device]:
        with (
            contextlib.suppress(OSError, ValueError),  # not there; empty, which cannot be mapped
            (folder / name).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image,  # CUDA's has 284 MB; few pages are read
        ):
            needs[name] = tuple(library for library in needed_libraries(image) if not library.startswith(ALWAYS_THERE))
    return needs


def find_missing(needs: Mapping[str, Sequence[str]], load: Callable[[str], Any]) -> dict[str, tuple[str, ...]]:
    """List the libraries that `load` cannot load, by the provider library that needs them."""
    absent = {library for libraries in needs.values() for library in libraries if not _loads(library, load)}
    missing = {name: tuple(library for library in libraries if library in absent) for name, libraries in needs.items()}
    return {name: libraries for name, libraries in missing.items() if libraries}


def find_other_versions(
    missing: Mapping[str, Sequence[str]], load: Callable[[str], Any], tensorrt: Path | None = None
) -> tuple[str, ...]:
    """List installed libraries of CUDA and TensorRT with other major versions than the `missing` ones.

    `tensorrt` is pip's folder of TensorRT's libraries, which the loader does not search.
    """
    absent = {library for libraries in missing.values() for library in libraries}
    found = []
    for library in sorted(absent):
        name, _, major = library.rpartition(".")
        if name in ("libcublas.so", "libcudart.so", "libnvinfer.so") and major.isdecimal():
            near = (f"{name}.{int(major) + step}" for step in (-2, -1, 1, 2))
            found += [one for one in near if (tensorrt and (tensorrt / one).exists()) or _loads(one, load)]
    return tuple(found)


def needed_libraries(image: bytes | mmap.mmap) -> tuple[str, ...]:
    """List the libraries that a 64-bit little-endian ELF file needs (DT_NEEDED); none for any other file."""
    if image[:6] != b"\x7fELF\x02\x01":
        return ()
    try:
        return _read_needed(image)
    except (struct.error, OverflowError):  # cut short, or offsets that no file has
        return ()


def read_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver:
    """Ask the CUDA driver for its version and GPUs. Initialises it in this process, but takes no memory of a GPU.

    NVIDIA's management library would number the GPUs by their bus and ignore CUDA_VISIBLE_DEVICES; sessions take CUDA's
    own numbers, so CUDA is asked.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError as error:
        return Driver(None, str(error))
    version = None
    try:
        number = ctypes.c_int()
        _call(cuda, "cuDriverGetVersion", ctypes.byref(number))
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        _call(cuda, "cuInit", 0)
        _call(cuda, "cuDeviceGetCount", ctypes.byref(number))
        return Driver(version, None, tuple(_read_gpu(cuda, ordinal) for ordinal in range(number.value)))
    except (OSError, AttributeError) as error:  # it refuses, or is a libcuda.so.1 without these functions
        return Driver(version, str(error))


def _package_folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module of that name that was not imported from anywhere
        return None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _read_needed(image: bytes | mmap.mmap) -> tuple[str, ...]:
    """Read through the program headers, which a stripped file has, too; `struct.error` where the file is cut short."""
    (headers,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    segments = [struct.unpack_from("<IIQQQQ", image, headers + size * place) for place in range(count)]
    entries: list[tuple[Any, ...]] = []
    for kind, _, offset, _, _, length in segments:
        if kind == PT_DYNAMIC:
            entries += takewhile(
                lambda entry: entry[0] != DT_NULL, struct.iter_unpack("<QQ", image[offset : offset + length])
            )
    table = next((value for tag, value in entries if tag == DT_STRTAB), 0)
    for kind, _, offset, address, _, length in segments:
        if kind == PT_LOAD and address <= table < address + length:  # the table's address, as an offset in the file
            names = offset + table - address
            return tuple(_string_at(image, names + value) for tag, value in entries if tag == DT_NEEDED)
    return ()


def _loads(library: str, load: Callable[[str], Any]) -> bool:
    try:
        load(library)
    except OSError:
        return False
    return True


def _string_at(image: bytes | mmap.mmap, start: int) -> str:
    return image[start : start + 256].partition(b"\0")[0].decode("ascii", errors="replace")


def _read_gpu(cuda: Any, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), ordinal)
    _call(cuda, "cuDeviceGetName", name, len(name), device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
    _call(cuda, "cuDeviceGetAttribute", ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)


def _call(cuda: Any, function: str, *arguments: Any) -> None:
    code = getattr(cuda, function)(*arguments)
    if code != 0:
        name = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(name))
        raise OSError(f"{function} failed with {name.value.decode() if name.value else f'error {code}'}")
