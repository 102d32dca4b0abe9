"""Round weights to 8 bits such that no CPU saturates: each alone, or all of a channel with each other.

Without VNNI, x86's u8s8 kernels add pairs of neighbouring products in 16 bits, so 255 times two weights of one sign
must stay below 2**15. The usual remedy is 7-bit weights. Here a channel's scale is chosen such that no two neighbours
of one sign sum to more than 128 steps, which takes less of the precision (docs/benchmarks.md has figures). So the sums
are exact in 32 bits everywhere, and int8's scores do not depend on the CPU's integer kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int8 = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

LARGEST_STEP = 127
MAX_NEIGHBOURS = 128
"""255 * 128 is the largest sum of two products that 16 bits hold."""
DAMPING = 0.02
"""The part of the mean second moment that is added to each: calibration has not seen everything."""
ROWS_AT_ONCE = 64


def quantize_weights(weights: Floats) -> tuple[Int8, Floats]:
    """Round `weights` (inputs, outputs) to int8 steps of a scale per output, (outputs,).

    >>> quantize_weights(np.array([[1.0, -2.0, 0.0]], np.float32))[0].tolist()
    [[127, -127, 0]]

    No two neighbours of one sign in a column sum to more than MAX_NEIGHBOURS steps.
    """
    scales = np.abs(weights).max(axis=0) / LARGEST_STEP
    if len(weights) > 1:
        first, second = weights[:-1], weights[1:]
        sums = np.where((first > 0) == (second > 0), np.abs(first) + np.abs(second), 0).max(axis=0)
        scales = np.maximum(scales, sums / (MAX_NEIGHBOURS - 1))  # each of the two may round up by half a step
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    steps = np.clip(np.rint(weights / scales), -LARGEST_STEP, LARGEST_STEP)
    return steps.astype(np.int8), scales


def compensate_weights(weights: Floats, moments: Floats, *, damping: float = DAMPING) -> tuple[Int8, Floats]:
    """Round as `quantize_weights` does, but make up for each error by later inputs.

    >>> steps, scales = compensate_weights(weights, x.T @ x / len(x))

    This is GPTQ (arXiv 2210.17323). `moments` are the inputs' mean of x xᵀ (inputs, inputs). Inputs are rounded from
    the largest to the smallest, and the part of each error that correlated inputs can carry is taken out of their
    weights. A weight that was moved so is cut where it would saturate with a neighbour.
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
    """Compute the upper Cholesky factor of the inverse of the damped moments."""
    mean = float(np.mean(np.diag(moments)))
    added = damping * mean if mean > 0 else 1.0
    inverse = np.linalg.inv(moments + added * np.eye(len(moments)))  # in float64
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float64)


def _bounds(steps: Doubles, row: int, is_rounded: npt.NDArray[np.bool_]) -> tuple[Doubles, Doubles]:
    """Bound a row's steps, least and most, by those of rounded neighbours."""
    high = np.full(steps.shape[1], float(LARGEST_STEP))
    low = -high
    for neighbour in (row - 1, row + 1):
        if is_rounded[neighbour + 1]:
            high = np.minimum(high, MAX_NEIGHBOURS - np.maximum(steps[neighbour], 0))
            low = np.maximum(low, -MAX_NEIGHBOURS - np.minimum(steps[neighbour], 0))
    return low, high
