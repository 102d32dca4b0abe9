"""Activations that lose less in 8 bits: scaled, and rotated in blocks of channels.

A token's scale is set by its largest channel, and a few channels are many times larger than the others, which have few
steps then. So channels are divided by factors, which go into the weights (SmoothQuant, arXiv 2211.10438), and blocks of
channels are multiplied by a Hadamard matrix, which spreads what is large over all of its block; the weights by the
inverse (QuaRot, arXiv 2404.00456). The product is the same, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cappy_engine.errors import GraphError
from cappy_export.half import Inputs, present_inputs, session_for
from cappy_export.int8_weights import Floats

BLOCK = 64
"""Channels rotated together, at most. On 613 PromptSource examples cappy-mini's errors, less those that an example's
candidates share, were 0.0081 without rotation (root mean square, compensated weights), 0.0054 with blocks of 16, 0.0049
with 32, 0.0047 with 64, and 0.0042 with all channels, which takes as long as the products themselves."""
QUIETEST = 0.25
"""The least root mean square of a channel, in that of all. It binds for 0.5% of what follows cappy-mini's Gelus."""
SMOOTHING = 0.25
"""The power of the ratio of activations to weights by which channels are divided. Of 0, 0.25 and 0.5 the best there."""


@dataclass(frozen=True)
class Activations:
    """What a product reads, over all tokens of the calibration: mean (inputs,) and, if asked for, x xᵀ's mean."""

    mean: Floats
    moments: Floats | None = None


@dataclass(frozen=True)
class Rotation:
    """x -> (x / factors) in blocks times a Hadamard matrix; `factors` (inputs,) are positive."""

    factors: Floats

    @property
    def matrix(self) -> Floats:
        """(block, block), symmetric and its own inverse; block is a power of two that divides the inputs."""
        block = math.gcd(len(self.factors), BLOCK)
        matrix = np.ones((1, 1))
        while len(matrix) < block:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return (matrix / math.sqrt(block)).astype(np.float32)

    def of_weights(self, weights: Floats) -> Floats:
        """`weights` (inputs, outputs) for rotated inputs."""
        return self._turned(weights * self.factors[:, None])

    def of_activations(self, activations: Activations) -> Activations:
        """What the product reads then."""
        mean = self._turned((activations.mean / self.factors)[:, None])[:, 0]
        if activations.moments is None:
            return Activations(mean)
        half = self._turned(activations.moments / np.outer(self.factors, self.factors))
        return Activations(mean, self._turned(half.T))

    def _turned(self, rows: Floats) -> Floats:
        """The matrix times each block of rows."""
        matrix = self.matrix
        turned: Floats = (matrix @ rows.reshape(-1, len(matrix), rows.shape[1])).reshape(rows.shape)
        return turned


def rotation_for(moments: Floats, weights: Sequence[Floats]) -> Rotation:
    """The rotation of an input with these second `moments` (inputs, inputs) that products with `weights` read."""
    sizes = np.sqrt(np.diag(moments))
    squares = np.sum([np.square(part, dtype=np.float64).sum(axis=1) for part in weights], axis=0)
    ratio = np.maximum(sizes, 1e-6) / np.maximum(np.sqrt(squares), 1e-6)
    logs = SMOOTHING * np.log(ratio)
    return Rotation(np.exp(logs - logs.mean()).astype(np.float32))


def measure_activations(
    source: Path, names: Sequence[str], calibration: Iterable[Inputs], *, has_moments: bool = False
) -> dict[str, Activations]:
    """What the model `source` computes on `calibration` (model inputs by name) as `names`; empty without inputs.

    A channel that the calibration hardly saw may be alive elsewhere, so none counts for less than QUIETEST. Second
    moments take inputs² times 4 bytes: 1.9 GB in all for a model of cappy-large's size. Raises GraphError where what is
    measured is not finite.
    """
    if not names:
        return {}  # ONNX Runtime takes an empty list for all outputs
    model = onnx.load(str(source))
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = session_for(model, source.parent)
    del model
    tokens: dict[str, int] = dict.fromkeys(names, 0)
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    squares: dict[str, Any] = dict.fromkeys(names, 0.0)
    for inputs in calibration:
        for name, value in zip(names, session.run(list(names), present_inputs(session, inputs)), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            tokens[name] += len(rows)
            sums[name] = sums[name] + rows.sum(axis=0, dtype=np.float64)
            if has_moments:
                squares[name] += rows.T @ rows
    found: dict[str, Activations] = {}
    for name, count in tokens.items():
        if count:
            if not np.isfinite(sums[name]).all():
                raise GraphError(f"{name} is not finite on the pairs to calibrate on")
            moments = _without_silence(squares.pop(name), count) if has_moments else None
            found[name] = Activations((sums[name] / count).astype(np.float32), moments)
    return found


def _without_silence(squares: Floats, count: int) -> Floats:
    """The mean of `count` tokens' sums of x xᵀ, in place, with no channel below QUIETEST."""
    squares /= np.float32(count)
    sizes = np.diag(squares)
    floor = QUIETEST**2 * sizes.mean()
    squares[np.diag_indices_from(squares)] = np.maximum(sizes, floor)
    return squares
