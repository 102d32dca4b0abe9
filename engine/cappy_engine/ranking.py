"""Order candidates by their scores. Pure: scores in, places out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cappy_engine.activations import Activation, activated_score


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


def first_best(scores: Iterable[float]) -> int:
    """Find the place of the greatest score; the first wins a tie.

    >>> first_best([0.2, 0.9, 0.9])
    1
    """
    return int(np.argmax(_listed(scores)))


def near_best(scores: Iterable[float], reach: float) -> list[int]:
    """List the places of scores, (n,) float32, at most `reach` below the greatest.

    >>> near_best(np.array([0.2, 0.9, 0.85], dtype=np.float32), 0.1)
    [1, 2]
    """
    listed = _listed(scores)
    return [int(place) for place in np.flatnonzero(listed >= listed.max() - reach)]


def best_first(scores: Iterable[float], exact: Mapping[int, float]) -> list[int]:
    """Order the places of scores, (n,) float32: those with an `exact` score first, by it, then the others by theirs.

    Among equals the first comes first.

        >>> best_first(np.array([0.2, 0.9, 0.85], dtype=np.float32), {1: 0.8, 2: 0.81})
        [2, 1, 0]
    """
    listed = _listed(scores).tolist()
    return sorted(range(len(listed)), key=lambda place: (place not in exact, -exact.get(place, listed[place])))


def ranked(
    responses: Sequence[str],
    scores: npt.NDArray[np.float32],
    truncated: npt.NDArray[np.bool_],
    exact: Mapping[int, float],
    *,
    activation: Activation = "identity",
) -> list[Candidate]:
    """Make candidates of `responses`, in the order of `best_first`: raw scores decide, whatever the `activation`.

    >>> ranked(["Yes", "No"], np.array([0.2, 0.9], dtype=np.float32), np.array([False, False]), {})[0].response
    'No'
    """
    return [
        Candidate(
            place,
            responses[place],
            activated_score(exact.get(place, float(scores[place])), activation),
            bool(truncated[place]),
            place in exact,
        )
        for place in best_first(scores, exact)
    ]


def _listed(scores: Iterable[float]) -> npt.NDArray[np.floating]:
    """Return an array of the scores in the order of iteration: a pandas Series is indexed by its labels."""
    return scores if isinstance(scores, np.ndarray) else np.array(list(scores), dtype=np.float64)
