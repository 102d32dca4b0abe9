"""Score a step's parts, and have only the guilty fail. Knows nothing of queues and threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import ScoringError
from cappy_engine.serving.jobs import Part

log = logging.getLogger(__name__)


def score_parts(run: Callable[[EncodedPairs], Scores], parts: Sequence[Part]) -> bool:
    """Score the pairs of all parts in one run, and put the scores where they belong.

    If the run fails, the request with the guilty pair fails, and the others run again. Where no pair is at fault, the
    parts are halved until the ones that fail are alone. Returns False if a part failed alone, for no pair's fault.

        >>> score_parts(lambda encoded: scorer.score_encoded(encoded).scores, parts)
        True
    """
    encoded = EncodedPairs.joined([part.job.encoded.chosen(part.rows) for part in parts])
    try:
        scores = run(encoded)
    except ScoringError as error:
        return _score_without_guilty(run, parts, error)
    except Exception as error:  # a fault of ours must not end the thread: nobody would ever be answered
        log.exception("a step failed")
        return _score_without_guilty(run, parts, ScoringError(f"{type(error).__name__}: {error}"))
    start = 0
    for part in parts:
        part.job.scores[part.rows] = scores[start : start + len(part.rows)]
        start += len(part.rows)
    return True


def _score_without_guilty(run: Callable[[EncodedPairs], Scores], parts: Sequence[Part], error: ScoringError) -> bool:
    if error.index is not None:
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        guilty = int(np.searchsorted(starts, error.index, side="right")) - 1
        place = int(parts[guilty].rows[error.index - starts[guilty]])
        parts[guilty].job.fail(ScoringError(error.problem, place))
        rest = [*parts[:guilty], *parts[guilty + 1 :]]
        return score_parts(run, rest) if rest else True
    if len(parts) > 1:
        half = len(parts) // 2
        return all([score_parts(run, parts[:half]), score_parts(run, parts[half:])])
    parts[0].job.fail(error)
    return False
