"""Compute with numpy what the native library computes: its operators' meaning, in the order of their functions.

Integers are equal to the library's. Floats are, to the last bit, in products of 8 bits without Gelu and layer norm; all
others are within `CLOSE`.
"""

from __future__ import annotations

from math import erf, sqrt
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cappy_engine.native.operands import (
    GROUP,
    PANEL,
    Angles,
    Bf16Layer,
    Bytes,
    Distances,
    Floats,
    Halves,
    Ids,
    Layer,
    Norm,
    Rotation,
    Rounding,
    SignedBytes,
)

Doubles = npt.NDArray[np.float64]
Stored = TypeVar("Stored", SignedBytes, Halves)
"""Weights as a file has them: 8 bits, or the bits of bfloat16."""
CLOSE = 1e-5
"""How near floats must be after a Gelu or a layer norm, or where their sums are taken in another order."""


def quantize_rows(x: Floats, rounding: Rounding) -> tuple[Bytes, Floats]:
    """Round the rows of `x` (rows, columns) to 8 bits; returns them and a scale for each, (rows, 1).

    >>> quantize_rows(np.float32([[-1, 0, 2]]), Rounding())[0]
    array([[ 64, 128, 255]], dtype=uint8)
    """
    with np.errstate(invalid="ignore", over="ignore"):
        most = np.maximum(np.abs(x).max(axis=1, keepdims=True, initial=0), np.float32(rounding.least))
        scales = (most * np.float32(1 / rounding.steps)).astype(np.float32)
        steps = np.rint(x * (np.float32(1) / scales)) + np.float32(rounding.zero_point)
        bounded = np.clip(np.where(np.isnan(steps), 0, steps), 0, 255)  # what is not a number is 0 steps
    return bounded.astype(np.uint8), scales


def rotate_rows(x: Floats, rotation: Rotation) -> Floats:
    """Rotate the rows of `x` (rows, columns) in steps of sums and differences. The first step is of neighbours.

    >>> rotate_rows(np.float32([[1, 2, 3, 4]]), Rotation(np.float32([1] * 4), np.float32([0] * 4), 4))
    array([[10., -2., -4.,  0.]], dtype=float32)
    """
    with np.errstate(invalid="ignore", over="ignore"):
        turned: Floats = x * rotation.factors + rotation.offsets
        apart = 1
        while apart < rotation.block:
            pairs = turned.reshape(len(x), x.shape[1] // (2 * apart), 2, apart)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            turned = np.stack([first + second, first - second], axis=2).reshape(x.shape)
            apart *= 2
    return turned


def normalize_rows(x: Floats, norm: Norm) -> Floats:
    """Take the layer norm of each row of `x` (rows, columns).

    >>> normalize_rows(np.float32([[1, 3]]), Norm(np.float32([1, 1]), np.float32([0, 2]), epsilon=0))
    array([[-1.,  3.]], dtype=float32)
    """
    wide = x.astype(np.float64)
    spread = np.sqrt(wide.var(axis=1, keepdims=True) + norm.epsilon)
    return np.asarray((wide - wide.mean(axis=1, keepdims=True)) / spread * norm.gamma + norm.beta, np.float32)


def gate_rows(x: Floats) -> Floats:
    """Multiply the Gelu of each row's first half by its second: (rows, 2 * columns) to (rows, columns).

    >>> gate_rows(np.float32([[1, 10]]))
    array([[8.413447]], dtype=float32)
    """
    gates, values = np.split(x, 2, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        return gelu(gates) * values


def linear(layer: Layer, rows: Bytes, scales: Floats, residual: Floats | None = None) -> Floats:
    """Run a linear layer on `rows` (rows, inner) with their `scales` (rows, 1); returns (rows, columns)."""
    weights = unpack(layer.weights) if layer.is_packed else layer.weights
    # In doubles the products' sums are exact, and their multiplication is fast.
    sums = (rows.astype(np.float64) - layer.zero_point) @ weights.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        result: Floats = sums.astype(np.float32) * layer.scales * scales + layer.bias
        return _finished(layer, result, residual)


def bf16_linear(layer: Bf16Layer, x: Floats, residual: Floats | None = None) -> Floats:
    """Run a linear layer of bfloat16 on `x` (rows, inner); returns (rows, columns)."""
    rows, weights = bf16_values(bf16_bits(x)), bf16_values(unpack(layer.weights))
    with np.errstate(invalid="ignore", over="ignore"):
        result = (rows.astype(np.float64) @ weights.astype(np.float64) + layer.bias).astype(np.float32)
        return _finished(layer, result, residual)


def _finished(layer: Layer | Bf16Layer, result: Floats, residual: Floats | None) -> Floats:
    """Apply the layer's last steps to a product with its bias.

    They are the Gelu, or the residual and the layer norm, as the layer says.
    """
    if layer.is_gelu:
        return gelu(result)
    added = result if residual is None else result + residual
    if layer.gamma is None or layer.beta is None:
        return added
    return normalize_rows(added, Norm(layer.gamma, layer.beta, layer.epsilon))


def attention(
    packed: Floats,
    lengths: Ids,
    heads: int,
    window: int | None = None,
    distances: Distances | None = None,
    angles: Angles | None = None,
) -> Floats:
    """Attend inside each pair of `packed` queries, keys and values, (tokens, 3 * hidden); returns (tokens, hidden).

        >>> attention(np.float32([[9, 9, 5]]), np.array([1]), heads=1)
        array([[5.]], dtype=float32)

    With a `window` a token sees those at most so many places away. Queries and keys are turned by `angles` first.
    """
    queries, keys, values = np.split(packed.astype(np.float64), 3, axis=1)
    queries, keys = _turned(queries, lengths, angles), _turned(keys, lengths, angles)
    found = [_attend(queries[pair], keys[pair], values[pair], heads, window, distances) for pair in _pairs(lengths)]
    return np.concatenate([np.empty((0, queries.shape[1])), *found]).astype(np.float32)


def first_attention(
    queries: Floats,
    packed: Floats,
    lengths: Ids,
    heads: int,
    distances: Distances | None = None,
    angles: Angles | None = None,
) -> Floats:
    """Attend with one query of each pair, (pairs, hidden), to `packed` keys and values; returns (pairs, hidden).

    >>> first_attention(np.float32([[9]]), np.float32([[9, 5]]), np.array([1]), heads=1)
    array([[5.]], dtype=float32)
    """
    keys, values = np.split(packed.astype(np.float64), 2, axis=1)
    keys = _turned(keys, lengths, angles)
    turned = _turned(queries.astype(np.float64), np.ones(len(queries), np.int64), angles)  # each at place 0
    found = [
        _attend(query[None], keys[pair], values[pair], heads, distances=distances)
        for query, pair in zip(turned, _pairs(lengths), strict=True)
    ]
    return np.concatenate([np.empty((0, queries.shape[1])), *found]).astype(np.float32)


def attention_at(
    places: Ids, packed: Floats, heads: int, distances: Distances | None = None, angles: Angles | None = None
) -> Floats:
    """Attend with the queries at some places of `packed`, which is one pair's; returns (places, hidden).

    >>> attention_at(np.array([1]), np.float32([[1, 0, 5], [1, 0, 7]]), heads=1)
    array([[6.]], dtype=float32)
    """
    queries, keys, values = np.split(packed.astype(np.float64), 3, axis=1)
    queries, keys = (_turned(part, np.array([len(packed)]), angles) for part in (queries, keys))
    return _attend(queries[places], keys, values, heads, None, distances, places).astype(np.float32)


def _turned(x: Doubles, lengths: Ids, angles: Angles | None) -> Doubles:
    """Turn points in each head: values i and half + i are the coordinates of one, turned by angle i of its place."""
    if angles is None:
        return x
    places = np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths)])
    cosines, sines = (part[places][:, None] for part in angles)
    size = 2 * cosines.shape[2]
    first, second = np.split(x.reshape(len(x), x.shape[1] // size, size), 2, axis=2)
    with np.errstate(invalid="ignore", over="ignore"):
        both = [first * cosines - second * sines, second * cosines + first * sines]
    return np.concatenate(both, axis=2).reshape(x.shape)


def _pairs(lengths: Ids) -> list[slice]:
    """Find each pair's rows."""
    return [slice(end - length, end) for end, length in zip(np.cumsum(lengths), lengths, strict=True)]


def _attend(
    queries: Doubles,
    keys: Doubles,
    values: Doubles,
    heads: int,
    window: int | None = None,
    distances: Distances | None = None,
    at: Ids | None = None,
) -> Doubles:
    """Attend inside one pair; each array is (tokens, hidden). Queries may be fewer: the first, or those `at` places."""
    by_head = [
        array.reshape(len(array), heads, array.shape[1] // heads).swapaxes(0, 1) for array in (queries, keys, values)
    ]
    places = np.arange(len(keys))
    apart = places - (places[: len(queries)] if at is None else at)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        scores = by_head[0] @ by_head[1].swapaxes(1, 2)
        if distances is None:
            scores /= sqrt(by_head[0].shape[2])
        else:
            rows = distances.rows[len(distances.rows) // 2 + apart]
            of_queries = by_head[0] @ distances.keys.swapaxes(1, 2).astype(np.float64)
            of_keys = by_head[1] @ distances.queries.swapaxes(1, 2).astype(np.float64)
            scores += np.take_along_axis(of_queries, rows[None], axis=2)
            scores += np.take_along_axis(of_keys, rows.T[None], axis=2).swapaxes(1, 2)
            scores *= distances.scale
        if window is not None:
            scores[:, np.abs(apart) > window] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True, initial=-np.inf))
        context: Doubles = weights / weights.sum(axis=2, keepdims=True) @ by_head[2]
    return context.swapaxes(0, 1).reshape(queries.shape)


def gelu(x: Floats) -> Floats:
    """Multiply each value by the normal distribution's integral up to it.

    >>> gelu(np.float32([-1, 0, 1]))
    array([-0.15865526,  0.        ,  0.8413447 ], dtype=float32)
    """
    integrals = [0.5 * (1 + erf(value / sqrt(2))) for value in x.ravel().tolist()]
    return np.asarray(x * np.reshape(integrals, x.shape), np.float32)


def are_close(found: Floats, wanted: Floats) -> bool:
    """Tell whether each value is near the wanted one, or is NaN in both.

        >>> are_close(np.float32([np.nan, 100]), np.float32([np.nan, 100.0001]))
        True

    The distance is relative to the largest wanted value, or to 1 if that is larger. An infinite value is never near.
    """
    bound = CLOSE * float(np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0))
    is_near = np.abs(found - wanted) <= bound
    return bool(is_near.all() or (is_near | np.isnan(wanted) & np.isnan(found)).all())


def are_equal(found: Floats | Bytes, wanted: Floats | Bytes) -> bool:
    """Tell whether each value is the same, or no number in both."""
    return np.array_equal(found, wanted, equal_nan=True)


def pack(weights: Stored, group: int = GROUP) -> Stored:
    """Lay weights (inner, columns) as the kernels read them: (columns / PANEL, inner / group, PANEL, group).

    >>> pack(np.zeros((8, 32), np.int8)).shape
    (2, 2, 16, 4)
    """
    inner, columns = weights.shape
    return np.ascontiguousarray(weights.reshape(inner // group, group, columns // PANEL, PANEL).transpose(2, 0, 3, 1))


def unpack(packed: Stored) -> Stored:
    """Lay packed weights back as (inner, columns).

    >>> unpack(np.zeros((2, 2, 16, 4), np.int8)).shape
    (8, 32)
    """
    panels, groups, width, depth = packed.shape
    return packed.transpose(1, 3, 0, 2).reshape(groups * depth, panels * width)


def bf16_bits(values: Floats) -> Halves:
    """Round to bfloat16, half to even, and return the bits: the upper half of float32's.

    >>> bf16_bits(np.float32([1, -2])).tolist()
    [16256, 49152]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    is_number = (bits & 0x7FFFFFFF) <= 0x7F800000
    return (np.where(is_number, rounded, bits | 0x400000) >> 16).astype(np.uint16)


def bf16_values(bits: Halves) -> Floats:
    """Return the numbers with the bits of bfloat16.

    >>> bf16_values(np.uint16([16256]))
    array([1.], dtype=float32)
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)
