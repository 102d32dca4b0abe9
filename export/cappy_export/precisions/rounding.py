"""Round weights to 8 bits such that no CPU saturates: each alone, or all of a channel with each other.

Without VNNI, x86's u8s8 kernels add two neighbouring products in 16 bits: of inputs 0 and 1, of 2 and 3, and so on. So
255 times two weights of one sign must stay below 2**15. The usual remedy is 7-bit weights. Here a channel's scale is
chosen such that no such pair of one sign sums to more than 128 steps, which takes less of the precision
(docs/benchmarks.md has figures). So the sums are exact in 32 bits everywhere, and int8's scores do not depend on the
CPU's integer kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int8 = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]

LARGEST_STEP = 127
MAX_PAIR = 128
"""255 * 128 is the largest sum of two products that 16 bits hold."""
DAMPING = 0.1
"""The part of the mean second moment that is added to each: calibration has not seen everything. On held-out pairs of
cappy-mini's tasks the squared errors of four of its products fell by 2 to 9% from 0.005 to 0.1; 0.3 was no better."""
ROWS_AT_ONCE = 64


def quantize_weights(weights: Floats) -> tuple[Int8, Floats]:
    """Round `weights` (inputs, outputs) to int8 steps of a scale per output, (outputs,).

    >>> quantize_weights(np.array([[1.0, -2.0, 0.0]], np.float32))[0].tolist()
    [[127, -127, 0]]

    No pair of inputs 2 i and 2 i + 1 has weights of one sign that sum to more than MAX_PAIR steps.
    """
    scales = np.abs(weights).max(axis=0) / LARGEST_STEP
    if len(weights) > 1:
        first, second = weights[0:-1:2], weights[1::2]
        sums = np.where((first > 0) == (second > 0), np.abs(first) + np.abs(second), 0).max(axis=0)
        scales = np.maximum(scales, sums / (MAX_PAIR - 1))  # each of the two may round up by half a step
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    steps = np.clip(np.rint(weights / scales), -LARGEST_STEP, LARGEST_STEP)
    return steps.astype(np.int8), scales


def compensate_weights(weights: Floats, moments: Floats) -> tuple[Int8, Floats]:
    """Round as `quantize_weights` does, but make up for each error by later inputs.

    >>> steps, scales = compensate_weights(weights, x.T @ x / len(x))

    This is GPTQ (arXiv 2210.17323), as LDLQ computes it (arXiv 2307.13304, theorem 6): from a factor of the moments,
    and not of their inverse. `moments` are the inputs' mean of x xᵀ (inputs, inputs). Inputs are rounded from the
    largest to the smallest, and each is rounded to what makes up for the errors of those before it. A weight that was
    moved so is cut where it would saturate with its neighbour.
    """
    _, scales = quantize_weights(weights)
    order = np.argsort(-np.diag(moments), kind="stable")
    feedback = _feedback(moments[np.ix_(order, order)])
    wanted = weights[order] / scales
    steps, errors = np.zeros(weights.shape, np.float32), np.zeros(weights.shape, np.float32)
    is_rounded = np.zeros(len(weights) + 1, bool)  # the last is no input's
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        stop = start + len(rows)
        wanted[start:stop] += feedback[start:stop, :start] @ errors[:start]
        for place, row in zip(range(start, stop), rows, strict=True):
            low, high = _bounds(steps, row ^ 1 if is_rounded[min(row ^ 1, len(weights))] else None)
            made_up = wanted[place] + feedback[place, start:place] @ errors[start:place]
            steps[row] = np.clip(np.rint(made_up), low, high)
            errors[place] = weights[row] / scales - steps[row]
            is_rounded[row] = True
    return steps.astype(np.int8), scales


def _feedback(moments: Floats) -> Floats:
    """Compute how errors of earlier inputs go into later ones: F of (1 + F)ᵀ D (1 + F), strictly lower, the moments."""
    mean = float(np.mean(np.diag(moments)))
    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper: moments = factor factorᵀ
    return np.ascontiguousarray(np.tril((factor / np.diag(factor)).T, -1), np.float32)


def _bounds(steps: Floats, neighbour: int | None) -> tuple[Floats | int, Floats | int]:
    """Return the least and the most steps of a row. They depend on its neighbour if that is rounded."""
    if neighbour is None:
        return -LARGEST_STEP, LARGEST_STEP
    return (
        np.maximum(-LARGEST_STEP, -MAX_PAIR - np.minimum(steps[neighbour], 0)),
        np.minimum(LARGEST_STEP, MAX_PAIR - np.maximum(steps[neighbour], 0)),
    )
