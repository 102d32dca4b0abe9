"""Order candidates by their scores. Pure: scores in, places out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Candidate:
    """A ranked candidate.

    `index` is its place in the list that was passed, `response` its text. `is_exact` says that `exact_winner` had it
    scored again in fp32: then `score` is that one.
    """

    index: int
    response: str
    score: float
    is_truncated: bool
    is_exact: bool = False


def first_best(scores: Sequence[float] | npt.NDArray[np.floating]) -> int:
    """Find the place of the greatest score; the first wins a tie.

    >>> first_best([0.2, 0.9, 0.9])
    1
    """
    return int(np.argmax(scores))


def near_best(scores: npt.NDArray[np.float32], margin: float) -> list[int]:
    """List the places of scores, (n,) float32, at most `margin` below the greatest.

    >>> near_best(np.array([0.2, 0.9, 0.85], dtype=np.float32), 0.1)
    [1, 2]
    """
    return [int(place) for place in np.flatnonzero(scores >= scores.max() - margin)]


def best_first(scores: npt.NDArray[np.float32], exact: Mapping[int, float]) -> list[int]:
    """Order the places of scores, (n,) float32: those with an `exact` score first, by it, then the others by theirs.

    Among equals the first comes first.

        >>> best_first(np.array([0.2, 0.9, 0.85], dtype=np.float32), {1: 0.8, 2: 0.81})
        [2, 1, 0]
    """
    return sorted(range(len(scores)), key=lambda place: (place not in exact, -exact.get(place, float(scores[place]))))
