"""Weights in 8 bits, such that no CPU saturates: each rounded alone, or all of a channel with each other.

Without VNNI, x86's u8s8 kernels add pairs of neighbouring products in 16 bits: 255 times two weights of one sign must
stay below 2**15. The usual remedy is 7-bit weights; here a channel's scale is chosen such that no two neighbours of one
sign sum to more than 128 steps, which takes less of the precision (docs/benchmarks.md has figures). So the sums are
exact in 32 bits everywhere, and int8's scores do not depend on the CPU's integer kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int8 = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

MAX_NEIGHBOURS = 128
"""255 * 128 is the largest sum of two products that 16 bits hold."""
DAMPING = 0.02
"""Of the mean second moment, added to each: what calibration saw is not all there is."""
ROWS_AT_ONCE = 64


def quantize_weights(weights: Floats, *, bits: int = 8, avoids_saturation: bool = True) -> tuple[Int8, Floats]:
    """`weights` (inputs, outputs) as int8 steps of a scale per output, (outputs,): the nearest multiples.

    No two neighbours of one sign in a column sum to more than MAX_NEIGHBOURS steps.
    """
    limit = 2 ** (bits - 1) - 1
    scales = np.abs(weights).max(axis=0) / limit
    if avoids_saturation and bits == 8 and len(weights) > 1:
        first, second = weights[:-1], weights[1:]
        sums = np.where((first > 0) == (second > 0), np.abs(first) + np.abs(second), 0).max(axis=0)
        scales = np.maximum(scales, sums / (MAX_NEIGHBOURS - 1))  # each of the two may round up by half a step
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    steps = np.clip(np.rint(weights / scales), -limit, limit)
    return steps.astype(np.int8), scales


def compensate_weights(weights: Floats, moments: Floats, *, damping: float = DAMPING) -> tuple[Int8, Floats]:
    """As `quantize_weights` (8 bits, no saturation), but every rounding error is made up for by the inputs after it.

    That is GPTQ (arXiv 2210.17323): with `moments`, the inputs' mean of x xᵀ (inputs, inputs), the inputs are rounded
    from the largest to the smallest, and what each error adds to the product is taken out of the weights of those that
    are correlated with it. A weight that was moved so is cut where it would saturate with a neighbour.
    """
    _, scales = quantize_weights(weights)
    order = np.argsort(-np.diag(moments), kind="stable")
    factor = _inverse_factor(moments[np.ix_(order, order)], damping)
    left = weights[order].astype(np.float64)
    steps = np.zeros(weights.shape)
    is_rounded = np.zeros(len(weights) + 2, bool)  # one before the first and one after the last never are
    for start in range(0, len(order), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(order))
        errors = np.zeros((stop - start, weights.shape[1]))
        for place in range(start, stop):
            row = order[place]
            low, high = _bounds(steps, row, is_rounded)
            steps[row] = np.clip(np.rint(left[place] / scales), low, high)
            is_rounded[row + 1] = True
            error = (left[place] - steps[row] * scales) / factor[place, place]
            left[place + 1 : stop] -= factor[place, place + 1 : stop, None] * error
            errors[place - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return steps.astype(np.int8), scales


def _inverse_factor(moments: Floats, damping: float) -> Doubles:
    """The upper Cholesky factor of the inverse of the damped moments."""
    mean = float(np.mean(np.diag(moments)))
    added = damping * mean if mean > 0 else 1.0
    inverse = np.linalg.inv(moments + added * np.eye(len(moments)))  # in float64
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float64)


def _bounds(steps: Doubles, row: int, is_rounded: npt.NDArray[np.bool_]) -> tuple[Doubles, Doubles]:
    """The least and the most steps that a row's weights may have beside those of its neighbours that are rounded."""
    high = np.full(steps.shape[1], 127.0)
    low = -high
    for neighbour in (row - 1, row + 1):
        if is_rounded[neighbour + 1]:
            high = np.minimum(high, MAX_NEIGHBOURS - np.maximum(steps[neighbour], 0))
            low = np.maximum(low, -MAX_NEIGHBOURS - np.minimum(steps[neighbour], 0))
    return low, high
