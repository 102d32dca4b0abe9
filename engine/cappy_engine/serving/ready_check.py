"""Check that a model scores as its bundle says, before it answers anybody, and again when something failed.

The canary is a few pairs whose scores the manifest records. Bundles of older exports have none for the CPU: then it is
the pairs with the largest errors of the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.bundle import Bundle
from cappy_engine.canary import Canary, read_canary
from cappy_engine.errors import BundleError, ModelBroken
from cappy_engine.json_values import number, size
from cappy_engine.options import ScorerInfo
from cappy_engine.pairs import Pair

LEAST_TOLERANCE = 1e-3


def find_canary(bundle: Bundle, info: ScorerInfo, encode: Callable[[list[Pair]], EncodedPairs]) -> Canary:
    """Read the canary for the model that `info` tells of. Raises BundleError where the manifest has none.

    >>> canary = find_canary(bundle, scorer.info, scorer.encode)
    """
    document = bundle.manifest.document
    if info.device in document.get("canary", {}).get("tolerance", {}):
        return read_canary(document, info.device, info.precision)
    try:
        return _canary_of_old_bundle(document["parity"]["precisions"][info.precision], encode)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"bundle {bundle.path} records no score for {info.precision} on {info.device} ({error!r}), so nothing "
            "could tell whether it scores right here; export it again"
        ) from error


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
    errors = np.abs(scores.astype(np.float64) - canary.scores)
    worst = int(errors.argmax())
    if not errors[worst] <= canary.tolerance:
        raise ModelBroken(
            f"the model gives wrong scores: {scores[worst]:.5f} for a pair of the bundle whose score is "
            f"{canary.scores[worst]:.5f}, and {canary.tolerance:g} is allowed; run 'cappy doctor', and export the "
            "bundle again"
        )
    return float(errors[worst])


def _canary_of_old_bundle(row: Mapping[str, Any], encode: Callable[[list[Pair]], EncodedPairs]) -> Canary:
    """Take the pairs that the proof of a model names, with the scores that it gave them.

    Long texts are cut in the manifest: they have other tokens now, and are left out.
    """
    worst = row["worst"]
    encoded = encode([(pair["instruction"], pair["response"]) for pair in worst])
    whole = [place for place, pair in enumerate(worst) if pair["tokens"] == encoded.lengths[place]]
    if not whole:
        raise ValueError("all its pairs are cut")
    scores = np.array([number(worst[place]["score"]) for place in whole], dtype=np.float32)
    return Canary(encoded.chosen(whole), scores, max(2 * size(row["max_error"]), LEAST_TOLERANCE))
