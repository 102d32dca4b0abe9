"""Describe what the kernels take: how rows are rounded and rotated, linear layers, and the distances of attention."""

from __future__ import annotations

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
    """Say how rows become 8 bits: `steps` above `zero_point` stand for a row's maximum, which is at least `least`.

    The maximum is that of the sizes if `is_signed`, else of the values.
    """

    zero_point: int = 128
    steps: int = 127
    least: float = 1e-12
    is_signed: bool = True


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


AFTER_GELU = Rounding(zero_point=16, steps=239, least=0.17 * 239 / 16, is_signed=False)
"""How activations after Gelu are rounded: few are negative, at least -0.17, so most steps are left for the others."""

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
