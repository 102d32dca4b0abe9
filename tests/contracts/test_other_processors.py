"""The kernels on arm64, in qemu's emulator, beside numpy. ziglang compiles them. The same program runs here, too."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cappy_engine.native import build as native
from cappy_engine.native import reference
from tests.support.places import ROOT

pytestmark = pytest.mark.slow
MAIN = ROOT / "tests" / "support" / "run_kernels.cpp"
Run = Callable[..., bytes]


def make_program(folder: Path, compiler: list[str], kind: str) -> Path:
    """Link the kernels with a program that runs one of them."""
    objects = native.compile_sources(folder, compiler, kind=kind)
    command = [*compiler, "-std=c++17", "-O1", f"-I{native.SOURCES}", str(MAIN), *objects]
    subprocess.run([*command, "-o", str(folder / "run_kernels")], check=True, capture_output=True)
    return folder / "run_kernels"


def find_zig() -> list[str]:
    """Find ziglang in this environment, or in that of `make wheel`."""
    python = sys.executable if find_spec("ziglang") else str(ROOT / ".venv-wheel" / "bin" / "python")
    return [python, "-m", "ziglang", "c++"]


@pytest.fixture(scope="module", params=["here", "aarch64"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Call the program with some words and arrays on a processor; returns what it writes."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "here":
        compiler = next(native.find_compilers("cc", native.machine()), None)
        if compiler is None:
            pytest.skip("needs a C++ compiler")
        start = [str(make_program(folder, list(compiler.command), native.machine()))]
    else:
        emulator = shutil.which("qemu-aarch64")
        if not emulator or not Path(find_zig()[0]).exists():
            pytest.skip("needs qemu-aarch64 (Debian's package qemu-user), and ziglang (make .venv-wheel/ready)")
        start = [
            emulator,
            str(make_program(folder, [*find_zig(), "-target", "aarch64-linux-musl", "-static"], "aarch64")),
        ]

    def call(*words: object, arrays: tuple[npt.NDArray[np.generic], ...] = ()) -> bytes:
        given = b"".join(array.tobytes() for array in arrays)
        done = subprocess.run([*start, *map(str, words)], input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="module")
def sets(run: Run) -> list[str]:
    return run("sets").decode().split()


def test_every_processor_has_a_set(sets: list[str]) -> None:
    assert "scalar" in sets


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 33), (2, 384)])
@pytest.mark.parametrize(("zero_point", "steps", "is_signed"), [(128, 127, 1), (16, 239, 0)])
def test_rows_become_bytes_as_in_numpy(
    run: Run, sets: list[str], rows: int, columns: int, zero_point: int, steps: int, is_signed: int
) -> None:
    x = np.random.default_rng(rows * columns).normal(size=(rows, columns)).astype(np.float32)
    least = np.float32(1e-3)
    most = (np.abs(x) if is_signed else x).max(axis=1, keepdims=True)
    scales = np.maximum(most, least) * np.float32(1 / steps)
    expected = np.clip(np.rint(x * (1 / scales)) + zero_point, 0, 255).astype(np.uint8)
    for name in sets:
        found = run("quantize", name, rows, columns, zero_point, steps, least, is_signed, arrays=(x,))
        q = np.frombuffer(found, np.uint8, rows * columns).reshape(rows, columns)
        # A last bit of the scale may move a value that lies between two.
        assert np.abs(q.astype(int) - expected).max() <= 1
        assert np.mean(q != expected) <= 0.01
        np.testing.assert_allclose(np.frombuffer(found, np.float32, offset=rows * columns), scales[:, 0], rtol=1e-6)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 4, 1), (5, 37, 19), (9, 128, 48)])
@pytest.mark.parametrize("end", ["", "gelu", "norm"])
def test_products_are_those_of_numpy(run: Run, sets: list[str], rows: int, inner: int, columns: int, end: str) -> None:
    random = np.random.default_rng(inner)
    q = random.integers(0, 256, (rows, inner)).astype(np.uint8)
    weights = random.integers(-127, 128, (inner, columns)).astype(np.int8)
    scales = random.uniform(0.001, 0.01, rows).astype(np.float32)
    weight_scales = random.uniform(0.001, 0.01, columns).astype(np.float32)
    bias, gamma, beta = random.normal(size=(3, columns)).astype(np.float32)
    residual = random.normal(size=(rows, columns)).astype(np.float32)
    sums = (q.astype(np.int64) - 128) @ weights.astype(np.int64)
    expected = sums * scales[:, None].astype(float) * weight_scales + bias
    arrays: tuple[npt.NDArray[np.generic], ...] = (q, scales, weights, weight_scales, bias)
    if end == "gelu":
        expected = expected * (1 + np.vectorize(math.erf)(expected / math.sqrt(2))) / 2
    if end == "norm":
        arrays = (*arrays, residual, gamma, beta)
        whole = expected + residual
        spread = whole.var(axis=1, keepdims=True) + 1e-5
        expected = (whole - whole.mean(axis=1, keepdims=True)) / np.sqrt(spread) * gamma + beta
    for name in sets:
        words = ("linear", name, rows, inner, columns, 128, int(end == "gelu"), 1e-5 if end == "norm" else 0)
        found = np.frombuffer(run(*words, arrays=arrays), np.float32).reshape(rows, columns)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("heads", "head_size"), [(2, 32), (1, 64), (3, 5)])
def test_attention_is_that_of_numpy(run: Run, sets: list[str], heads: int, head_size: int) -> None:
    lengths = np.array([1, 40, 7, 520])
    packed = np.random.default_rng(heads).normal(size=(lengths.sum(), 3 * heads * head_size)).astype(np.float32)
    packed[300, 0] = np.nan
    expected = reference.attention(packed, lengths, heads)
    for name in sets:
        written = run("attention", name, heads, head_size, *lengths, arrays=(packed,))
        found = np.frombuffer(written, np.float32).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_emulator_is_there_where_it_must_be() -> None:
    """CI says so by CAPPY_NEEDS_ARM64: a test that is skipped proves nothing."""
    if os.environ.get("CAPPY_NEEDS_ARM64"):
        assert shutil.which("qemu-aarch64")
        assert Path(find_zig()[0]).exists()
