"""Counts what came back, and compares the scores with those of the scorer. Knows nothing of how it was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.load.driving import HUNG, REFUSED, Exchange

ANSWERED = 200
ReadScores = Callable[[bytes], Sequence[float]]
"""Reads the scores of an answer, in the order of its pairs. Raises what a malformed body raises."""


def quantile(seconds: Sequence[float], share: float) -> float:
    """Find the time within which this share of the requests was answered: a time that was measured, never between two.

    >>> quantile([0.1, 0.2, 0.3, 0.4], 0.5)
    0.2
    """
    return float(np.quantile(np.asarray(seconds, dtype=np.float64), share, method="inverted_cdf"))


def latencies(seconds: Sequence[float]) -> dict[str, Any]:
    """Describe latencies in milliseconds, with their count; None where there are none.

    >>> latencies([0.25])
    {'count': 1, 'p50': 250.0, 'p90': 250.0, 'p99': 250.0, 'max': 250.0}
    """
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"count": len(seconds)} | {
        name: round(quantile(seconds, share) * 1e3, 3) if len(seconds) else None for name, share in shares.items()
    }


def count_outcomes(exchanges: Sequence[Exchange], sizes: Sequence[int]) -> dict[str, Any]:
    """Count the requests by what became of them, with latencies of each kind; `sizes` are the pairs of each request.

    `accepted` were answered with scores, `refused` with 429, `hung` never; all others `failed`, counted by their
    problems. `late_ms` tells how far behind its own schedule the generator was.

        >>> count_outcomes(exchanges, sizes)["refused"]["count"]
        17
    """
    accepted = [one for one in exchanges if one.status == ANSWERED]
    refused = [one for one in exchanges if one.status == REFUSED]
    failed = [one for one in exchanges if one.status not in (ANSWERED, REFUSED) and one.problem != HUNG]
    return {
        "requests": len(exchanges),
        "accepted": latencies([one.seconds for one in accepted]),
        "accepted_by_pairs": {
            str(size): {"sent": sum(sizes[one.place] == size for one in exchanges)}
            | latencies([one.seconds for one in accepted if sizes[one.place] == size])
            for size in sorted({sizes[one.place] for one in exchanges})
        },
        "refused": latencies([one.seconds for one in refused]),
        "failed": len(failed),
        "problems": dict(Counter(one.problem or f"status {one.status}" for one in failed)),
        "hung": sum(one.problem == HUNG for one in exchanges),
        "late_ms": latencies([one.sent - one.due for one in exchanges]),
    }


def compare_scores(
    exchanges: Sequence[Exchange], expected: Sequence[npt.NDArray[np.float64]], read: ReadScores
) -> dict[str, Any]:
    """Compare the scores of all accepted answers with the `expected` scores of their requests.

    The numbers must be equal. `different` counts answers with at least one other score, and `unreadable` counts answers
    without a score for every pair.

        >>> compare_scores(exchanges, expected, NATIVE.scores)
        {'compared': 120, 'different': 0, 'unreadable': 0, 'max_difference': 0.0}
    """
    different, unreadable, largest = 0, 0, 0.0
    accepted = [one for one in exchanges if one.status == ANSWERED]
    for one in accepted:
        try:
            found = np.asarray(read(one.body), dtype=np.float64)
        except (ValueError, KeyError, TypeError, IndexError):
            unreadable += 1
            continue
        if found.shape != expected[one.place].shape or not np.isfinite(found).all():
            unreadable += 1
            continue
        difference = float(np.abs(found - expected[one.place]).max(initial=0.0))
        different += difference > 0
        largest = max(largest, difference)
    return {"compared": len(accepted), "different": different, "unreadable": unreadable, "max_difference": largest}
