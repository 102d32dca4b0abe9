"""Check that a model scores as its bundle says.

This is done before the model answers anybody, and again when something failed.
"""

from __future__ import annotations

from collections.abc import Callable

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.canary import Canary
from cappy_engine.errors import ModelBroken


def check_scores(canary: Canary, run: Callable[[EncodedPairs], Scores]) -> float:
    """Score the canary; returns the largest difference from what the bundle records.

        >>> check_scores(canary, lambda encoded: scorer.score_encoded(encoded).scores)
        0.0

    Raises ModelBroken if it is too large, or the model fails.
    """
    try:
        scores = run(canary.pairs)
    except Exception as error:
        raise ModelBroken(f"the model fails on pairs that it scored when it was exported: {error}") from error
    difference, wrong = canary.compare(scores)
    if wrong:
        raise ModelBroken(f"the model gives {wrong}; run 'cappy doctor', and export the bundle again")
    return difference
