"""Turn raw scores into what other tools show of them. The order stays, whatever is asked for."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from cappy_engine.checks import check_word

Activation = Literal["identity", "sigmoid"]
ACTIVATIONS = ("identity", "sigmoid")
"""The functions that tools put on a model's one output. A softmax is none of them: over one output it is always 1."""


def activated(scores: npt.NDArray[np.float32], activation: Activation) -> npt.NDArray[np.float32]:
    """Apply an activation to raw scores, (n,) float32.

        >>> activated(np.array([0, 2], dtype=np.float32), "sigmoid")
        array([0.5      , 0.8807971], dtype=float32)

    Raises ValueError for an unknown one.
    """
    check_word("activation", activation, ACTIVATIONS)
    if activation == "identity":
        return scores
    with np.errstate(over="ignore"):  # the exponential of a large number is infinity, whose inverse is 0
        return (1 / (1 + np.exp(-scores.astype(np.float64)))).astype(np.float32)


def activated_score(score: float, activation: Activation) -> float:
    """Apply an activation to one raw score.

    >>> activated_score(0.0, "sigmoid")
    0.5
    """
    return sigmoid(score) if activation == "sigmoid" else score


def sigmoid(score: float) -> float:
    """Squash a score between 0 and 1.

    >>> sigmoid(0.0)
    0.5
    """
    small = math.exp(-abs(score))  # the exponential of a large number is not a float
    return (1.0 if score >= 0 else small) / (1.0 + small)
