"""The canary: a model that scores otherwise than its bundle records is not served."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.bundle import EMBEDDED
from cappy_engine.canary import Canary, read_canary
from cappy_engine.errors import BundleError, ModelBroken, ScoringError
from cappy_engine.scorer import Scorer
from cappy_engine.serving.ready_check import check_scores
from tests.support.bundles import change_manifest, copy_bundle, without


def canary_of(scorer: Scorer) -> Canary:
    return read_canary(scorer.exact.bundle.manifest.document, scorer.info.device, scorer.info.precision)


@pytest.mark.slow
def test_a_bundle_scores_its_canary_as_it_says(bundle: Path) -> None:
    for path in (EMBEDDED, bundle):
        with Scorer.open(path, precision="int8") as scorer:
            canary = canary_of(scorer)
            assert len(canary.scores) > 1
            assert check_scores(canary, lambda encoded: scorer.score_encoded(encoded).scores) <= canary.tolerance


def test_scores_that_are_off_or_fail_are_a_broken_model(bundle: Path) -> None:
    with Scorer.open(bundle, precision="fp32") as scorer:
        canary = canary_of(scorer)

        def one_is_off(encoded: EncodedPairs, sign: int) -> Scores:
            scores = scorer.score_encoded(encoded).scores.copy()
            scores[-1] += sign * 2 * canary.tolerance
            return scores

        def fails(encoded: EncodedPairs) -> Scores:
            raise ScoringError("no device")

        assert canary.tolerance == 1e-4  # far above fp32's error: other processors round otherwise
        for sign in (1, -1):
            with pytest.raises(ModelBroken, match="wrong scores"):
                check_scores(canary, partial(one_is_off, sign=sign))
        with pytest.raises(ModelBroken, match="wrong scores: nan"):
            check_scores(canary, lambda encoded: np.full(len(encoded), np.nan, dtype=np.float32))
        with pytest.raises(ModelBroken, match="fails on pairs that it scored when it was exported: no device"):
            check_scores(canary, fails)


def test_a_bundle_without_a_canary_for_the_cpu_is_not_served(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "copy")
    change_manifest(copy, without("canary", "tolerance", "cpu"))
    with Scorer.open(copy, precision="fp32") as scorer, pytest.raises(BundleError) as caught:
        canary_of(scorer)
    assert str(caught.value) == (
        "the bundle has no canary for fp32 on cpu (KeyError('cpu')), so nothing could tell whether its scores are "
        "right there; export it again with --target cpu"
    )
