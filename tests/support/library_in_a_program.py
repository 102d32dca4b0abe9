"""The native library behind a program, which an emulator or a sanitizer may run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.native import build as native
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import (
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
from tests.support.places import SUPPORT


def make_program(folder: Path, compiler: Sequence[str]) -> str:
    """Compile the program that calls a library."""
    source, includes = str(SUPPORT / "run_kernels.cpp"), f"-I{native.SOURCES}"
    linker = [compiler[0], *("cc" if word == "c++" else word for word in compiler[1:])]
    made, program = str(folder / "run_kernels.o"), str(folder / "run_kernels")
    subprocess.run([*compiler, "-std=c++17", "-O2", includes, "-c", source, "-o", made], check=True)
    subprocess.run([*linker, "-O2", made, "-o", program, "-ldl"], check=True)
    return program


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
        rotation: Rotation,
        norm: Norm | None = None,
        *,
        is_gated: bool = False,
    ) -> tuple[Bytes, Floats]:
        norms, epsilon = ([norm.gamma, norm.beta], norm.epsilon) if norm else ([], 0.0)
        rows, columns = len(x), x.shape[1] // (1 + is_gated)
        how = (int(is_gated), int(norm is not None), epsilon, rotation.block)
        last = (rounding.zero_point, rounding.steps, rounding.least)
        turns = (rotation.factors, rotation.offsets)
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
