"""Score a step's parts, and have only the guilty fail. Knows nothing of queues and threads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import ScoringError
from cappy_engine.serving.jobs import Part

log = logging.getLogger(__name__)


def score_parts(run: Callable[[EncodedPairs], Scores], parts: Sequence[Part], check: Callable[[], None]) -> None:
    """Score the pairs of all parts in one run, and give their jobs the scores.

    If the run fails, the job with the guilty pair does, and the others run again, in halves. Where no pair is at fault,
    the parts are halved until the ones that fail are alone. Then `check` is asked, which raises if the model is broken.

        >>> score_parts(lambda encoded: scorer.score_encoded(encoded).scores, parts, check=lambda: None)
    """
    groups = [list(parts)]
    while groups:
        group = groups.pop()
        error = _run(run, group)
        if error is None:
            continue
        if error.index is not None:
            del group[_fail_guilty(group, error, error.index)]
        elif len(group) == 1:
            check()
            group.pop().job.fail(error)
        half = len(group) // 2
        groups += [each for each in (group[half:], group[:half]) if each]


def _run(run: Callable[[EncodedPairs], Scores], parts: Sequence[Part]) -> ScoringError | None:
    """Score parts; returns the error if there is one, also for what is a fault of ours."""
    try:
        scores = run(EncodedPairs.joined([part.encoded for part in parts]))
    except ScoringError as error:
        return error
    except Exception as error:
        log.exception("a step failed")
        return ScoringError(f"{type(error).__name__}: {error}")
    start = 0
    for part in parts:
        part.job.put(part.rows, scores[start : start + len(part.rows)])
        start += len(part.rows)
    return None


def _fail_guilty(parts: Sequence[Part], error: ScoringError, index: int) -> int:
    """Fail the job with the pair `index` of all parts' pairs; returns the place of its part."""
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    guilty = int(np.searchsorted(starts, index, side="right")) - 1
    part = parts[guilty]
    part.job.fail(ScoringError(error.problem, int(part.rows[index - starts[guilty]])))
    return guilty
