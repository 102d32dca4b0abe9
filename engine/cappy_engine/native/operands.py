"""Describe what the kernels take: how rows are rounded and rotated, linear layers, and the distances of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
SignedBytes = npt.NDArray[np.int8]
Halves = npt.NDArray[np.uint16]
"""The bits of bfloat16."""
Ids = npt.NDArray[np.int64]
Angles = tuple[Floats, Floats]
"""Cosines and sines, (places, half of a head's size), by which attention turns queries and keys."""


@dataclass(frozen=True)
class Rounding:
    """Say how rows become 8 bits: `steps` above `zero_point` stand for a row's largest size, at least `least`."""

    zero_point: int = 128
    steps: int = 127
    least: float = 1e-12


@dataclass(frozen=True)
class Rotation:
    """Say how rows are rotated before: each value times its factor plus its offset, each block by a Hadamard matrix.

    `factors` and `offsets` are (columns,); `block` is a power of two that divides the columns.
    """

    factors: Floats
    offsets: Floats
    block: int


@dataclass(frozen=True)
class Norm:
    """Say how rows are normalised before: a layer norm with `gamma` and `beta`, (columns,)."""

    gamma: Floats
    beta: Floats
    epsilon: float = 1e-5


PANEL = 16
"""Columns of weights that lie together: those of one vector of 32-bit sums."""
GROUP = 4
"""Neighbours in a column that lie together: 8-bit products are summed in fours."""
BF16_GROUP = 2
"""The same for bfloat16, whose products are summed in pairs."""


@dataclass(frozen=True)
class Layer:
    """Hold a linear layer: `weights` (inner, columns), or packed (columns / PANEL, inner / GROUP, PANEL, GROUP).

    `scales` and `bias` are (columns,). A residual that is given is added; with `gamma` and `beta` a layer norm follows.
    """

    weights: SignedBytes
    scales: Floats
    bias: Floats
    zero_point: int = 128
    is_gelu: bool = False
    gamma: Floats | None = None
    beta: Floats | None = None
    epsilon: float = 1e-5

    @property
    def is_packed(self) -> bool:
        """True if the weights lie as the kernels read them."""
        return self.weights.ndim == 4

    @property
    def inner(self) -> int:
        """Count the values of a row that the layer takes."""
        return self.weights.shape[1] * GROUP if self.is_packed else len(self.weights)

    @property
    def columns(self) -> int:
        """Count the values of a row that the layer gives."""
        return len(self.bias)


@dataclass(frozen=True)
class Bf16Layer:
    """Hold a linear layer of bfloat16: `weights` are bits, packed in groups of BF16_GROUP. The rest is as in Layer."""

    weights: Halves
    bias: Floats
    is_gelu: bool = False
    gamma: Floats | None = None
    beta: Floats | None = None
    epsilon: float = 1e-5


@dataclass(frozen=True)
class Distances:
    """Hold what distances add to attention's scores: scale (query * keys[row] + key * queries[row]).

    `keys` and `queries` are (heads, count, head size). `rows`, (2 * farthest + 1,), are numbers of them; that of query
    q and key k of a pair is rows[farthest + k - q]. `scale` takes the place of 1 / sqrt(head size).
    """

    keys: Floats
    queries: Floats
    rows: Ids
    scale: float


def draw_rows(random: np.random.Generator, rows: int, inner: int) -> Floats:
    """Draw rows to be rounded: of many sizes, of halves of a step, of nothing, and with what is not finite."""
    x = (random.standard_normal((rows, inner)) * 10.0 ** random.integers(-3, 4, (rows, 1))).astype(np.float32)
    x[0], x[0, 0], x[1] = np.arange(inner) % 254 - 126.5, 127, 0
    x[2, inner // 2], x[3, inner // 3], x[4, -1] = np.nan, -np.inf, 1e5
    return x


@dataclass(frozen=True)
class Product:
    """Hold what is drawn for a product: bytes of rows and their scales, weights by their kind, scales of columns.

    The rest is for what comes behind: values for each column, and a residual. One row's scale is not a number.
    """

    values: Bytes
    scales: Floats
    weights: dict[str, SignedBytes]
    column_scales: Floats
    bias: Floats
    norm: Norm
    residual: Floats


def draw_product(random: np.random.Generator, rows: int, inner: int, columns: int) -> Product:
    """Draw a product, whose sums are some ones.

    Weights are `any`, or `gentle`: pairs of them times bytes fit in 16 bits. In `above` and `below` one pair just does
    not.
    """
    values = random.integers(0, 256, (rows, inner), np.uint8)
    scales, column_scales = random.uniform(0.5, 1, (rows, 1)), random.uniform(2e-4, 4e-4, columns) / inner**0.5
    weights = random.integers(-127, 128, (inner, columns), np.int8)
    values[0], weights[:, 0], column_scales[0] = 255, 127, 1e-5 / inner  # the largest sum
    scales[rows // 2] = np.nan
    gentle = weights // np.int8(2)
    above, below = gentle.copy(), gentle.copy()
    above[:2, -1], below[:2, -1] = (65, 64), (-65, -64)
    kinds = {"any": weights, "gentle": gentle, "above": above, "below": below}
    bias, gamma, beta, *residual = random.standard_normal((3 + rows, columns)).astype(np.float32)
    behind = bias, Norm(gamma, beta, epsilon=0.5), np.array(residual)  # so large an epsilon is seen
    return Product(values, scales.astype(np.float32), kinds, column_scales.astype(np.float32), *behind)


def draw_halves(random: np.random.Generator, rows: int, inner: int) -> Floats:
    """Draw rows for bfloat16: in every other, values are its numbers, or half between two. One is not a number."""
    x = random.standard_normal((rows, inner)).astype(np.float32)
    x[::2] = (x[::2].view(np.uint32) & np.uint32(0xFFFF8000)).view(np.float32)
    x.view(np.uint32)[rows // 2, inner // 2] = 0x7FFFFFFF  # the next would be minus 0
    return x


@dataclass(frozen=True)
class Pairs:
    """Hold what is drawn for a `kind` of attention: `packed` queries, keys and values of pairs, and what it sees."""

    kind: str
    packed: Floats
    lengths: Ids
    heads: int
    window: int | None = None
    distances: Distances | None = None
    angles: Angles | None = None


def draw_attention(random: np.random.Generator) -> Iterator[Pairs]:
    """Draw pairs for each kind of attention.

    Heads fill whole vectors, or end anywhere. Two pairs have large queries and keys, whose scores choose one key. In
    the third a key is not a number, in one head. The last pair is cut into tasks, and with a window into blocks of
    queries.
    """
    lengths, heads, window = np.array([1, 2, 3, 33, 97]), 2, 5
    kinds = (("", 64), ("Disentangled", 58), ("Rotary", 58), ("LocalRotary", 64))
    for kind, size in kinds:
        packed = random.standard_normal((lengths.sum(), 3 * heads * size)).astype(np.float32)
        packed[:3, : 2 * heads * size] *= 30
        packed[4, heads * size] = np.nan
        distances = draw_distances(random, lengths[-1], heads, size) if kind == "Disentangled" else None
        angles = draw_angles(random, lengths[-1], size) if "Rotary" in kind else None
        yield Pairs(kind, packed, lengths, heads, window if "Local" in kind else None, distances, angles)


def draw_distances(random: np.random.Generator, farthest: int, heads: int, head_size: int) -> Distances:
    """Draw keys and queries of distances; far distances share them, as DeBERTa's do."""
    buckets = 20  # to one side
    keys, queries = random.standard_normal((2, heads, 2 * buckets + 1, head_size)).astype(np.float32)
    apart = np.arange(-farthest, farthest + 1)
    rows = np.where(np.abs(apart) < buckets // 2, apart, np.sign(apart) * (buckets // 4 + np.abs(apart) // 2))
    return Distances(keys, queries, np.clip(rows, -buckets, buckets) + buckets, scale=0.1)


def draw_angles(random: np.random.Generator, places: int, head_size: int) -> Angles:
    """Draw the cosines and sines of angles that have nothing in common."""
    radians = random.uniform(0, 6, (places, head_size // 2))
    return np.cos(radians).astype(np.float32), np.sin(radians).astype(np.float32)
