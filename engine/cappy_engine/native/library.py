"""Call the native library's plain functions, by ctypes: for its test when it is loaded, and for the tests.

ONNX Runtime does not come this way; it calls the library's kernels itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.native import structures
from cappy_engine.native.operands import (
    BF16_GROUP,
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


@dataclass(frozen=True)
class ChosenSet:
    """Say which kernels a session takes: those for one `instruction_set`, from the library at `path`."""

    path: Path
    instruction_set: str


class NativeLibrary:
    """The library at `path`, loaded into this process. Raises OSError if it cannot be, or is another one."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        try:
            self._sets = self._library.cappy_instruction_sets
            self._chosen = self._library.cappy_chosen
            self._chosen_threads = self._library.cappy_chosen_threads
            self._choose = self._library.cappy_choose
            self._registrations = self._library.cappy_registrations
            self._quantize_rows = self._library.cappy_quantize_rows
            self._gate_rows = self._library.cappy_gate_rows
            self._linear = self._library.cappy_linear
            self._attention = self._library.cappy_attention
            sizes = self._library.cappy_struct_sizes
        except AttributeError as error:
            raise OSError(f"{path} is not a library of cappy-engine of this version ({error})") from error
        sizes.restype = ctypes.POINTER(ctypes.c_int64)
        if sizes()[: len(structures.ALL)] != [ctypes.sizeof(each) for each in structures.ALL]:
            raise OSError(f"{path} is not a library of cappy-engine of this version (its structures have other sizes)")
        self._sets.restype = self._chosen.restype = ctypes.c_char_p
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._chosen_threads.restype = count
        self._choose.argtypes = (ctypes.c_char_p, count)
        self._quantize_rows.argtypes = (ctypes.c_char_p, pointer, count, count, *[pointer] * 4)
        self._gate_rows.argtypes = (ctypes.c_char_p, pointer, count, count, pointer)
        self._linear.argtypes = (ctypes.c_char_p, pointer, pointer, pointer, count, pointer, pointer)
        self._attention.argtypes = (ctypes.c_char_p, pointer)

    @property
    def instruction_sets(self) -> list[str]:
        """List the sets that this processor and its system can use, the best first."""
        return str(self._sets().decode()).split()

    @property
    def chosen(self) -> str:
        """Name the set of sessions that this thread opens from now on."""
        return str(self._chosen().decode())

    @property
    def registrations(self) -> int:
        """Count the sessions' options that took the library's operators."""
        return int(self._registrations())

    @property
    def chosen_threads(self) -> int:
        """Count the threads of sessions that this thread opens from now on: kernels split their work for so many."""
        return int(self._chosen_threads())

    def choose(self, instruction_set: str, threads: int | None = None) -> None:
        """Use an instruction set for sessions that this thread opens from now on.

        These sessions have `threads` threads; None is one for each processor of the system. Raises ValueError if the
        set cannot be used here.
        """
        _known(self._choose(instruction_set.encode(), threads or 0), instruction_set)

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
        """Rotate and round the rows of `x` (rows, columns) to 8 bits; returns them and a scale for each, (rows, 1).

        Rows that are gated before have twice as many values. Gating, layer norm and rotation come in this order.
        """
        x = np.ascontiguousarray(x, np.float32)
        rows, columns = len(x), x.shape[1] // (2 if is_gated else 1)
        rounded, scales = np.empty((rows, columns), np.uint8), np.empty((rows, 1), np.float32)
        how = structures.Rounding(rounding.zero_point, rounding.steps, rounding.least)
        factors, offsets = map(_contiguous, (rotation.factors, rotation.offsets))
        gamma, beta = map(_contiguous, (norm.gamma, norm.beta) if norm else (None, None))
        turns = (_at(factors), _at(offsets), rotation.block)
        before = structures.Preparation(is_gated, _at(gamma), _at(beta), norm.epsilon if norm else 0, *turns)
        done = self._quantize_rows(
            *(instruction_set.encode(), _at(x), rows, columns, ctypes.byref(before), ctypes.byref(how)),
            *(_at(rounded), _at(scales)),
        )
        _known(done, instruction_set)
        return rounded, scales

    def gate_rows(self, instruction_set: str, x: Floats) -> Floats:
        """Multiply the Gelu of each row's first half by its second: (rows, 2 * columns) to (rows, columns)."""
        x, count = np.ascontiguousarray(x, np.float32), x.shape[1] // 2
        result = np.empty((len(x), count), np.float32)
        _known(self._gate_rows(instruction_set.encode(), _at(x), len(x), count, _at(result)), instruction_set)
        return result

    def linear(
        self, instruction_set: str, layer: Layer, rows: Bytes, scales: Floats, residual: Floats | None = None
    ) -> Floats:
        """Run a linear layer on `rows` (rows, inner) with their `scales` (rows, 1); returns (rows, columns)."""
        layer_arrays = (layer.weights, layer.scales, layer.bias, layer.gamma, layer.beta)
        weights, column_scales, bias, gamma, beta = (_contiguous(array) for array in layer_arrays)
        rows, scales = np.ascontiguousarray(rows, np.uint8), np.ascontiguousarray(scales, np.float32)
        residual = _contiguous(residual)
        result = np.empty((len(rows), layer.columns), np.float32)
        described = structures.LinearWeights(
            *(_at(weights), layer.is_packed, False, layer.inner, layer.columns, _at(column_scales), _at(bias)),
            *(layer.zero_point, layer.is_gelu, residual is not None, _at(gamma), _at(beta), layer.epsilon),
        )
        arrays = (_at(rows), _at(scales), len(rows), _at(residual), _at(result))
        _known(self._linear(instruction_set.encode(), ctypes.byref(described), *arrays), instruction_set)
        return result

    def bf16_linear(self, instruction_set: str, layer: Bf16Layer, x: Floats, residual: Floats | None = None) -> Floats:
        """Run a linear layer of bfloat16 on `x` (rows, inner); returns (rows, columns)."""
        layer_arrays = (layer.weights, layer.bias, layer.gamma, layer.beta)
        weights, bias, gamma, beta = (_contiguous(array) for array in layer_arrays)
        x, residual = np.ascontiguousarray(x, np.float32), _contiguous(residual)
        result = np.empty((len(x), len(layer.bias)), np.float32)
        described = structures.LinearWeights(
            *(_at(weights), True, True, layer.weights.shape[1] * BF16_GROUP, len(layer.bias), None, _at(bias)),
            *(0, layer.is_gelu, residual is not None, _at(gamma), _at(beta), layer.epsilon),
        )
        arrays = (_at(x), None, len(x), _at(residual), _at(result))
        _known(self._linear(instruction_set.encode(), ctypes.byref(described), *arrays), instruction_set)
        return result

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
        """Attend inside each pair of `packed` queries, keys and values, (tokens, 3 * hidden); returns (tokens, hidden).

        With a `window` a token sees those at most so many places away. Raises ValueError if the lengths, (pairs,), are
        not those of the tokens, or there are no `distances` or `angles` for a pair as long.
        """
        packed, hidden = np.ascontiguousarray(packed, np.float32), packed.shape[1] // 3
        result = np.empty((len(packed), hidden), np.float32)
        rows = (_at(packed), 3 * hidden, _at(packed[:, hidden:]), 3 * hidden, _at(result), heads, hidden // heads)
        shape = (*rows, -1 if window is None else window)
        self._attend(instruction_set, shape, (distances, angles), (len(packed), lengths), is_first=False)
        return result

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
        """Attend with one query of each pair, (pairs, hidden), to `packed` keys and values; returns (pairs, hidden)."""
        queries, packed = np.ascontiguousarray(queries, np.float32), np.ascontiguousarray(packed, np.float32)
        hidden, result = queries.shape[1], np.empty(queries.shape, np.float32)
        rows = (_at(queries), hidden, _at(packed), 2 * hidden, _at(result), heads, hidden // heads, -1)
        self._attend(instruction_set, rows, (distances, angles), (len(packed), lengths), is_first=True)
        return result

    def _attend(
        self,
        instruction_set: str,
        shape: tuple[int | None, ...],
        positions: tuple[Distances | None, Angles | None],
        pairs: tuple[int, Ids],
        *,
        is_first: bool,
    ) -> None:
        tokens, lengths = pairs[0], np.ascontiguousarray(pairs[1], np.int64)
        distances, angles = positions
        described: tuple[float | None, ...] = (1 / sqrt(shape[6] or 1), None, None, None, 0, 0)
        if distances is not None:
            keys, queries = (np.ascontiguousarray(array, np.float32) for array in (distances.keys, distances.queries))
            rows = np.ascontiguousarray(distances.rows, np.int64)
            described = (distances.scale, _at(keys), _at(queries), _at(rows), len(rows) // 2, keys.shape[1])
        cosines, sines = map(_contiguous, angles or (None, None))
        turns = (_at(cosines), _at(sines), *(cosines.shape if cosines is not None else (0, 0)))
        given = structures.AttentionInput(*shape, *described, *turns, tokens, _at(lengths), len(lengths), is_first)
        if not self._attention(instruction_set.encode(), ctypes.byref(given)):
            _known(instruction_set in self.instruction_sets, instruction_set)
            problem = f"the lengths {lengths.tolist()} are not those of pairs with {tokens} tokens"
            lacking = "distances" if distances is not None else "places" if angles else None
            raise ValueError(f"{problem}, or there are no rows for their {lacking}" if lacking else problem)


def _known(done: int, instruction_set: str) -> None:
    if not done:
        raise ValueError(f"this processor cannot use the instruction set {instruction_set!r}")


def _contiguous(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
    return None if array is None else np.ascontiguousarray(array)


def _at(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data
