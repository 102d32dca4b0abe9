"""The library's test of itself on arm64, in qemu's emulator; ziglang compiles it. The same program runs here, too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cappy_engine.cpu.built import why_no_library
from cappy_engine.cpu.kernels import _choose, self_test
from cappy_engine.errors import InstallationError
from cappy_engine.native import build as native
from cappy_engine.native import reference
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import (
    AFTER_GELU,
    Angles,
    Bf16Layer,
    Bytes,
    Distances,
    Floats,
    Ids,
    Layer,
    Norm,
    Rotation,
    Rounding,
)
from tests.support.places import ROOT

pytestmark = pytest.mark.slow
SYSTEM = Path("/usr/aarch64-linux-gnu")
"""The C library of arm64, in Debian's package libc6-arm64-cross."""
MAIN = ROOT / "tests" / "support" / "run_kernels.cpp"


class LibraryInAProgram(NativeLibrary):
    """The library behind a program, which an emulator may run: a call is a process, arrays go through pipes."""

    def __init__(self, start: list[str]) -> None:
        self._start = start

    @property
    def instruction_sets(self) -> list[str]:
        return self._run("sets").decode().split()

    def quantize_rows(
        self,
        instruction_set: str,
        x: Floats,
        rounding: Rounding,
        rotation: Rotation | None = None,
        norm: Norm | None = None,
        *,
        is_gated: bool = False,
    ) -> tuple[Bytes, Floats]:
        norms, epsilon = ([norm.gamma, norm.beta], norm.epsilon) if norm else ([], 0.0)
        block, turns = (rotation.block, [rotation.factors, rotation.offsets]) if rotation else (0, [])
        rows, columns = len(x), x.shape[1] // (1 + is_gated)
        how = (int(is_gated), int(norm is not None), epsilon, block)
        last = (rounding.zero_point, rounding.steps, rounding.least, int(rounding.is_signed))
        found = self._run("quantize", instruction_set, rows, columns, *how, *last, arrays=[x, *norms, *turns])
        scales = np.frombuffer(found, np.float32, offset=rows * columns)
        return np.frombuffer(found, np.uint8, rows * columns).reshape(rows, columns), scales.reshape(-1, 1)

    def gate_rows(self, instruction_set: str, x: Floats) -> Floats:
        found = self._run("gate", instruction_set, len(x), x.shape[1] // 2, arrays=[x])
        return np.frombuffer(found, np.float32).reshape(len(x), -1)

    def linear(
        self, instruction_set: str, layer: Layer, rows: Bytes, scales: Floats, residual: Floats | None = None
    ) -> Floats:
        shape = (len(rows), layer.inner, layer.columns)
        after = (int(layer.is_gelu), int(residual is not None), int(layer.gamma is not None))
        how = (*after, int(layer.is_packed), layer.epsilon)
        arrays = (rows, scales, layer.weights, layer.scales, layer.bias, residual, layer.gamma, layer.beta)
        found = self._run("linear", instruction_set, *shape, layer.zero_point, *how, arrays=arrays)
        return np.frombuffer(found, np.float32).reshape(shape[0], shape[2])

    def bf16_linear(self, instruction_set: str, layer: Bf16Layer, x: Floats, residual: Floats | None = None) -> Floats:
        after = (int(layer.is_gelu), int(residual is not None), int(layer.gamma is not None))
        how = (*x.shape, len(layer.bias), *after, layer.epsilon)
        arrays = (x, layer.weights, layer.bias, residual, layer.gamma, layer.beta)
        found = self._run("bf16", instruction_set, *how, arrays=arrays)
        return np.frombuffer(found, np.float32).reshape(len(x), -1)

    def attention(
        self,
        instruction_set: str,
        packed: Floats,
        lengths: Ids,
        heads: int,
        window: int | None = None,
        distances: Distances | None = None,
        angles: Angles | None = None,
    ) -> Floats:
        shape = (0, heads, packed.shape[1] // 3 // heads, -1 if window is None else window)
        found = self._run_attention(instruction_set, shape, lengths, [packed], (distances, angles))
        return found.reshape(len(packed), -1)

    def first_attention(
        self,
        instruction_set: str,
        queries: Floats,
        packed: Floats,
        lengths: Ids,
        heads: int,
        distances: Distances | None = None,
        angles: Angles | None = None,
    ) -> Floats:
        shape = (1, heads, queries.shape[1] // heads, -1)
        found = self._run_attention(instruction_set, shape, lengths, [queries, packed], (distances, angles))
        return found.reshape(queries.shape)

    def _run_attention(
        self,
        instruction_set: str,
        shape: tuple[int, int, int, int],
        lengths: Ids,
        arrays: list[npt.NDArray[Any]],
        positions: tuple[Distances | None, Angles | None],
    ) -> Floats:
        how: tuple[float, ...] = (0, 0, shape[2] ** -0.5)
        distances, angles = positions
        if distances is not None:
            how = (distances.keys.shape[1], len(distances.rows) // 2, distances.scale)
            arrays = [*arrays, distances.keys, distances.queries, distances.rows]
        places = 0 if angles is None else len(angles[0])
        found = self._run(
            "attention", instruction_set, *shape, *how, places, *lengths, arrays=[*arrays, *(angles or ())]
        )
        return np.frombuffer(found, np.float32)

    def _run(self, *words: object, arrays: Sequence[npt.NDArray[Any] | None] = ()) -> bytes:
        given = b"".join(array.tobytes() for array in arrays if array is not None)
        done = subprocess.run([*self._start, *map(str, words)], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def find_zig(target: str) -> list[str]:
    """Find ziglang in this environment, or in that of `make wheel`, as a compiler for a target."""
    python = sys.executable if find_spec("ziglang") else str(ROOT / ".venv-wheel" / "bin" / "python")
    return [python, "-m", "ziglang", "c++", "-target", target]


def make_program(folder: Path, compiler: Sequence[str]) -> str:
    """Compile the program that calls a library."""
    includes, linker = f"-I{native.SOURCES}", [compiler[0], *("cc" if word == "c++" else word for word in compiler[1:])]
    made, program = str(folder / "run_kernels.o"), str(folder / "run_kernels")
    subprocess.run([*compiler, "-std=c++17", "-O2", includes, "-c", str(MAIN), "-o", made], check=True)
    subprocess.run([*linker, "-O2", made, "-o", program, "-ldl"], check=True)
    return program


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


@pytest.fixture(scope="module", params=["here", "aarch64"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LibraryInAProgram:
    """The library for a processor; that of arm64 on one that has all its instructions."""
    if request.param == "aarch64":
        emulated: LibraryInAProgram = request.getfixturevalue("arm64")("max")
        return emulated
    compiler = next(native.find_compilers("cc", native.machine()), None)
    if compiler is None or why_no_library():
        pytest.skip(f"needs a C++ compiler, and the library: {why_no_library()}")
    program = make_program(tmp_path_factory.mktemp("here"), list(compiler.command))
    return LibraryInAProgram([program, str(native.SOURCES / native.LIBRARY)])


def test_every_set_of_a_processor_passes_the_library_s_test(library: LibraryInAProgram) -> None:
    is_arm64 = "neon" in library.instruction_sets
    names = [name for name in library.instruction_sets if not (is_arm64 and name == "amx_emulated")]  # plain C++, slow
    assert "scalar" in names
    assert {name: self_test(library, name) for name in names} == dict.fromkeys(names, "")


SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")


def test_no_kernel_reads_or_writes_outside_of_its_arrays(tmp_path: Path) -> None:
    """Nor does it do what C++ leaves undefined. The program frees nothing, so leaks are not looked for."""
    compiler = next(native.find_compilers("cc", native.machine()), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    try:
        program = make_program(tmp_path, [*compiler.command, *SANITIZERS])
    except subprocess.CalledProcessError:
        pytest.skip("needs a C++ compiler with the address and undefined sanitizers")
    made = native.build(tmp_path, compiler.command, SANITIZERS)
    library = LibraryInAProgram(["env", "ASAN_OPTIONS=detect_leaks=0", program, str(made)])
    lengths, packed = np.array([1, 40, 7, 520]), np.ones((568, 3 * 15), np.float32)
    for name in library.instruction_sets:
        assert self_test(library, name) == "", name
        assert np.isfinite(library.attention(name, packed, lengths, 3)).all(), name  # odd heads, keys in two blocks


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
def test_products_of_the_largest_bytes_and_of_rows_that_end_anywhere(
    library: LibraryInAProgram, zero_point: int
) -> None:
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
def test_long_pairs_odd_heads_and_what_is_not_a_number(library: LibraryInAProgram, heads: int, head_size: int) -> None:
    lengths = np.array([1, 40, 7, 520])
    packed = np.random.default_rng(heads).normal(size=(lengths.sum(), 3 * heads * head_size)).astype(np.float32)
    packed[300, 0] = np.nan
    expected = reference.attention(packed, lengths, heads)
    for name in library.instruction_sets:
        found = library.attention(name, packed, lengths, heads)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_test_would_notice(library: LibraryInAProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    right = library.quantize_rows

    def wrong(
        instruction_set: str, x: Floats, rounding: Rounding, rotation: Rotation | None = None
    ) -> tuple[Bytes, Floats]:
        rounded, scales = right(instruction_set, x, rounding, rotation)
        return rounded ^ (rounding == AFTER_GELU), scales

    monkeypatch.setattr(library, "quantize_rows", wrong)
    assert self_test(library, "scalar").startswith("QuantizeRows differs from numpy")
