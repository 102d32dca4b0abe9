"""The canary: a model that scores otherwise than its bundle records is not served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.errors import BundleError, ModelBroken, ScoringError
from cappy_engine.scorer import Scorer
from cappy_engine.serving.ready_check import check_scores, find_canary
from tests.support.bundles import copy_bundle, read_manifest, write_manifest


@pytest.mark.slow
def test_a_bundle_scores_its_canary_as_it_says(bundle: Path) -> None:
    for path in (EMBEDDED, bundle):
        with Scorer.open(path, precision="int8") as scorer:
            canary = find_canary(open_bundle(path), scorer.info, scorer.encode)
            assert len(canary.scores) > 1
            assert check_scores(canary, lambda encoded: scorer.score_encoded(encoded).scores) <= canary.tolerance


def test_scores_that_are_off_or_fail_are_a_broken_model(bundle: Path) -> None:
    with Scorer.open(bundle, precision="fp32") as scorer:
        canary = find_canary(open_bundle(bundle), scorer.info, scorer.encode)

        def one_is_off(encoded: EncodedPairs) -> Scores:
            scores = scorer.score_encoded(encoded).scores.copy()
            scores[-1] += 2 * canary.tolerance
            return scores

        def fails(encoded: EncodedPairs) -> Scores:
            raise ScoringError("no device")

        assert canary.tolerance == 1e-3  # far above fp32's error: other processors round otherwise
        with pytest.raises(ModelBroken, match="wrong scores"):
            check_scores(canary, one_is_off)
        with pytest.raises(ModelBroken, match="wrong scores: nan"):
            check_scores(canary, lambda encoded: np.full(len(encoded), np.nan, dtype=np.float32))
        with pytest.raises(ModelBroken, match="fails on pairs that it scored when it was exported: no device"):
            check_scores(canary, fails)


def test_a_cpu_model_may_be_off_by_twice_the_largest_error_of_its_proof(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "copy")
    document = read_manifest(copy)
    row = document["parity"]["precisions"]["int8"]
    row["max_error"] = 0.01
    row["worst"][0] |= {"tokens": 700, "score": 99.0}  # of a long text, which the manifest has cut
    write_manifest(copy, document)
    with Scorer.open(copy, precision="int8") as scorer:
        before, canary = (find_canary(open_bundle(each), scorer.info, scorer.encode) for each in (bundle, copy))
    assert canary.scores.tolist() == before.scores.tolist()[1:]
    assert check_scores(canary, lambda encoded: canary.scores + np.float32(0.019)) == pytest.approx(0.019, abs=1e-6)
    with pytest.raises(ModelBroken, match="wrong scores"):
        check_scores(canary, lambda encoded: canary.scores + np.float32(0.021))


def test_a_bundle_with_a_canary_for_the_cpu_is_held_against_it(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "copy")
    document = read_manifest(copy)
    document["canary"]["tolerance"]["cpu"] = {"fp32": 0.001}
    write_manifest(copy, document)
    with Scorer.open(copy, precision="fp32") as scorer:
        canary = find_canary(open_bundle(copy), scorer.info, scorer.encode)
        assert canary.pairs.lengths.tolist() == [len(pair["input_ids"]) for pair in document["canary"]["pairs"]]
        assert check_scores(canary, lambda encoded: scorer.score_encoded(encoded).scores) <= 0.001


def test_a_bundle_that_records_no_scores_is_not_served(bundle: Path, tmp_path: Path) -> None:
    copy = copy_bundle(tmp_path / "copy")
    document = read_manifest(copy)
    document["parity"]["precisions"]["fp32"]["worst"] = []
    write_manifest(copy, document)
    with Scorer.open(copy, precision="fp32") as scorer, pytest.raises(BundleError, match="records no score for fp32"):
        find_canary(open_bundle(copy), scorer.info, scorer.encode)
