"""The kernels of processors that are not at hand: of arm64, and of x86-64 with AVX-512, AVX-VNNI and AMX.

arm64's library is compiled by ziglang, and runs in qemu's emulator. In that for AVX-512, plain C++ stands for each
instruction (tests/support/avx512.h), and for AMX's tiles. The address and undefined sanitizers look over all that runs
there: no kernel reads or writes outside of its arrays, nor does what C++ leaves undefined.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from cappy_engine.cpu.built import why_no_library
from cappy_engine.cpu.kernels import _choose, self_test
from cappy_engine.errors import InstallationError
from cappy_engine.native import build as native
from cappy_engine.native import reference
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import Bytes, Floats, Layer, Rotation, Rounding
from tests.support.library_in_a_program import LibraryInAProgram, make_program
from tests.support.places import ROOT, SUPPORT

pytestmark = pytest.mark.slow
SYSTEM = Path("/usr/aarch64-linux-gnu")
"""The C library of arm64, in Debian's package libc6-arm64-cross."""


def find_zig(target: str) -> list[str]:
    """Find ziglang in this environment, or in that of `make wheel`, as a compiler for a target."""
    python = sys.executable if find_spec("ziglang") else str(ROOT / ".venv-wheel" / "bin" / "python")
    return [python, "-m", "ziglang", "c++", "-target", target]


def find_library(folder: Path, compiler: list[str]) -> Path:
    """Take arm64's library out of its wheel, where CAPPY_WHEELS names a folder with one; else compile it."""
    for wheel in (ROOT / os.environ.get("CAPPY_WHEELS", "nowhere")).glob("*aarch64.whl"):
        with zipfile.ZipFile(wheel) as files:
            return Path(files.extract(f"cappy_engine/native/{native.LIBRARY}", folder))
    return native.build(folder, compiler, kind="aarch64")


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LibraryInAProgram]:
    """Give arm64's library on a processor that qemu emulates."""
    folder, emulator = tmp_path_factory.mktemp("aarch64"), shutil.which("qemu-aarch64")
    zig = find_zig(f"aarch64-linux-gnu.{native.GLIBC}")
    if not (emulator and SYSTEM.is_dir() and Path(zig[0]).exists()):
        pytest.skip("needs Debian's packages qemu-user and libc6-arm64-cross, and ziglang (make .venv-wheel/ready)")
    program, library = make_program(folder, zig), str(find_library(folder, zig))
    return lambda processor: LibraryInAProgram([emulator, "-cpu", processor, "-L", str(SYSTEM), program, library])


X86 = ["amx", "avx512bf16", "avx512", "avxvnni", "avx2"]
PLAIN = ("-mavx2", "-mfma", "-DCAPPY_EMULATED_TILES", "-include", str(SUPPORT / "avx512.h"))
NO_WARNINGS = ("-Wno-psabi", "-Wno-ignored-attributes")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0", "-g1")


def build_with_avx512(folder: Path, compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """Compile a library that has all of x86-64's kernels on any such processor with AVX2."""
    sources = shutil.copytree(native.SOURCES, folder / "sources", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(SUPPORT / "cpu_features.cpp", sources)
    sets = {name: given if name == "avx2" else PLAIN for name, given in native.ENDINGS["x86_64"].items()}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "SOURCES", sources)
        patched.setattr(native, "ENDINGS", {**native.ENDINGS, "x86_64": sets})
        return native.build(folder, compiler, [*NO_WARNINGS, *flags], kind="x86_64")


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    """Find the system's compiler."""
    found = next(native.find_compilers("cc", native.machine()), None)
    if found is None or why_no_library():
        pytest.skip(f"needs a C++ compiler, and the library: {why_no_library()}")
    return list(found.command)


@pytest.fixture(scope="module")
def compiler_for_avx2(compiler: list[str]) -> list[str]:
    """Find the system's compiler, on an x86-64 processor with AVX2."""
    if "avx2" not in NativeLibrary(native.SOURCES / native.LIBRARY).instruction_sets:
        pytest.skip("needs an x86-64 processor with AVX2")
    return compiler


@pytest.fixture(scope="module", params=["here", "avx512", "aarch64"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    """The library for a processor; those of AVX-512 and of arm64 for one that has all its instructions."""
    if request.param == "aarch64":
        emulated: LibraryInAProgram = request.getfixturevalue("arm64")("max")
        return emulated
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "avx512":
        return library_with_avx512(folder, request.getfixturevalue("compiler_for_avx2"))
    program = make_program(folder, request.getfixturevalue("compiler"))
    return LibraryInAProgram([program, str(native.SOURCES / native.LIBRARY)])


def library_with_avx512(folder: Path, compiler: list[str]) -> NativeLibrary:
    """Compile it with sanitizers, if the compiler has them. The program frees nothing, so leaks are not looked for."""
    try:
        program = make_program(folder, [*compiler, *SANITIZERS])
    except subprocess.CalledProcessError:
        return NativeLibrary(build_with_avx512(folder, compiler, ["-Og"]))
    made = build_with_avx512(folder, compiler, SANITIZERS)
    found = LibraryInAProgram(["env", "ASAN_OPTIONS=detect_leaks=0", program, str(made)])
    assert found.instruction_sets == [*X86, "scalar", "amx_emulated"]
    return found


def test_every_set_of_a_processor_passes_the_library_s_test(library: NativeLibrary) -> None:
    is_emulated = not {"neon", "amx"}.isdisjoint(library.instruction_sets)
    names = [name for name in library.instruction_sets if not (is_emulated and name == "amx_emulated")]  # slow there
    assert "scalar" in names
    assert {name: self_test(library, name) for name in names} == dict.fromkeys(names, "")


ARM64 = ["i8mm", "dotprod", "neon"]


@pytest.mark.parametrize(("processor", "missing"), [("max", 0), ("cortex-a76", 1), ("cortex-a72", 2)])
def test_arm64_takes_the_best_set_that_its_processor_has(
    arm64: Callable[[str], LibraryInAProgram], processor: str, missing: int
) -> None:
    library, found = arm64(processor), _choose(arm64(processor), Path(native.LIBRARY), "auto")
    assert (found.used, found.why_not) == (ARM64[missing], "")
    assert library.instruction_sets == [*ARM64[missing:], "scalar", "amx_emulated"]
    for name in ARM64[:missing]:
        with pytest.raises(InstallationError, match=f"CAPPY_KERNELS is '{name}'; on this processor, choose from auto"):
            _choose(library, Path(native.LIBRARY), name)


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_products_of_the_largest_bytes_and_of_rows_that_end_anywhere(library: NativeLibrary, zero_point: int) -> None:
    random = np.random.default_rng(zero_point)
    for rows, inner in enumerate([1, 3, 5, 8, 9, 15, 16, 17, 23, 31, 70], start=1):
        values = random.choice(np.array([0, 255, 128, 7], np.uint8), (rows, inner))
        weights = random.choice(np.array([-128, 127, 0, 5], np.int8), (inner, 33))
        values[0], weights[:, 0], weights[:, 1] = 0, -128, 127
        scales = random.uniform(0.5, 2, rows + 33).astype(np.float32)
        layer = Layer(weights, scales[rows:], np.zeros(33, np.float32), zero_point)
        wanted = reference.linear(layer, values, scales[:rows, None])
        for name in library.instruction_sets:
            np.testing.assert_array_equal(library.linear(name, layer, values, scales[:rows, None]), wanted, name)


@pytest.mark.parametrize(("heads", "head_size"), [(2, 32), (3, 5)])
def test_long_pairs_odd_heads_and_what_is_not_a_number(library: NativeLibrary, heads: int, head_size: int) -> None:
    lengths = np.array([1, 40, 7, 520])
    packed = np.random.default_rng(heads).normal(size=(lengths.sum(), 3 * heads * head_size)).astype(np.float32)
    packed[300, 0] = np.nan
    expected = reference.attention(packed, lengths, heads)
    for name in library.instruction_sets:
        found = library.attention(name, packed, lengths, heads)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_test_would_notice(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    right = library.quantize_rows

    def wrong(instruction_set: str, x: Floats, rounding: Rounding, rotation: Rotation) -> tuple[Bytes, Floats]:
        rounded, scales = right(instruction_set, x, rounding, rotation)
        return rounded ^ bool((rotation.factors != 1).any()), scales

    monkeypatch.setattr(library, "quantize_rows", wrong)
    assert self_test(library, "scalar").startswith("QuantizeRotatedRows differs from numpy")
