"""Parity's arithmetic, against scipy and hand-counted cases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cappy_engine.batching import Grouping, Scores
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import ParityError
from cappy_engine.scorer import Scorer
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.limits import LIMITS, Limits
from cappy_export.proof.pairs import default_pairs
from cappy_export.proof.parity import (
    candidate_groups,
    describe_pairs,
    measure,
    require,
    score_in_shapes,
    spearman,
    violations,
    winner_agreement,
)
from cappy_export.proof.reference import Reference
from tests.support.places import TINY

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 3.0]), min_size=3, max_size=40)


def floats(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32)


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
@given(SCORES)
def test_spearman_is_scipys(values: list[float]) -> None:
    first, second = floats(values), floats(values[::-1])
    expected = stats.spearmanr(first, second).statistic
    assert spearman(first, second) == pytest.approx(0.0 if np.isnan(expected) else expected, abs=1e-12)


def test_constant_scores_have_no_rank_correlation() -> None:
    assert spearman(floats([1, 2, 3]), floats([5, 5, 5])) == 0.0


@given(SCORES, st.data())
def test_a_nan_is_never_a_rank_correlation(values: list[float], data: st.DataObject) -> None:
    good, bad = floats(values), floats(values)
    bad[data.draw(st.integers(0, len(values) - 1))] = np.nan
    assert all(np.isnan(spearman(*scores)) for scores in ((bad, good), (good, bad), (bad, bad)))


def test_groups_are_rows_with_one_instruction() -> None:
    pairs = [("a", "1"), ("b", "1"), ("a", "2"), ("c", "1"), ("b", "2"), ("a", "3")]
    assert candidate_groups(pairs) == [[0, 2, 5], [1, 4]]


def test_the_first_of_a_tie_wins() -> None:
    reference = floats([0.5, 0.5, 0.1, 0.9])
    assert winner_agreement(reference, floats([0.7, 0.6, 0.1, 0.9]), [[0, 1], [2, 3]]) == 1.0
    assert winner_agreement(reference, floats([0.6, 0.7, 0.1, 0.9]), [[0, 1], [2, 3]]) == 0.5
    assert winner_agreement(reference, reference, []) is None


def test_a_nan_neither_wins_nor_loses() -> None:
    good, bad = floats([0.5, 0.1, 0.3, 0.9]), floats([np.nan, 0.1, 0.3, 0.9])
    assert all(np.isnan(winner_agreement(*scores, [[0, 1], [2, 3]]) or 0) for scores in ((good, bad), (bad, bad)))
    assert winner_agreement(good, bad, [[2, 3]]) == 1.0, "only groups count"


def test_a_report_has_the_errors_and_the_worst_pairs() -> None:
    pairs = [("question", f"answer {number}") for number in range(8)]
    reference = floats([0.1 * number for number in range(8)])
    scores = reference.copy()
    scores[3] += 0.5
    scores[5] -= 0.25
    report = measure(reference, scores, pairs, np.arange(8))
    assert report["max_error"] == pytest.approx(0.5)
    assert report["mean_error"] == pytest.approx(0.75 / 8)
    assert report["relative_error"] == pytest.approx(np.sqrt((0.5**2 + 0.25**2) / 8) / np.std(reference))
    assert [worst["pair"] for worst in report["worst"]][:2] == [3, 5]
    assert report["worst"][0]["response"] == "answer 3"
    assert report["winner_agreement"] == 0.0


def parity_of(**row: float | None) -> dict[str, object]:
    complete = {"max_error": 0.0, "relative_error": 0.0, "spearman": 1.0, "winner_agreement": 1.0, **row}
    return {"precisions": {"fp32": complete}}


@pytest.mark.parametrize(
    ("row", "limits", "count"),
    [
        ({"max_error": 1e-4}, Limits(max_error=1e-4), 0),
        ({"max_error": 1.1e-4}, Limits(max_error=1e-4), 1),
        ({"max_error": float("nan")}, Limits(max_error=1e-4), 1),
        ({"relative_error": 0.25}, Limits(max_relative_error=0.25), 0),
        ({"relative_error": 0.26}, Limits(max_relative_error=0.25), 1),
        ({"relative_error": float("nan")}, Limits(max_relative_error=0.25), 1),
        ({"relative_error": None}, Limits(max_relative_error=0.25), 0),
        ({"spearman": 0.94, "winner_agreement": 0.5}, Limits(min_spearman=0.95, min_winner_agreement=0.6), 2),
        ({"spearman": 0.95, "winner_agreement": 0.6}, Limits(min_spearman=0.95, min_winner_agreement=0.6), 0),
        ({"spearman": float("nan")}, Limits(min_spearman=0.95), 1),
        ({"winner_agreement": None}, Limits(min_winner_agreement=1.0), 1),
        ({"winner_agreement": None}, Limits(min_spearman=1.0), 0),
        ({"max_error": 9.0, "spearman": -1.0}, Limits(), 0),
    ],
)
def test_a_broken_limit_is_a_violation(row: dict[str, float | None], limits: Limits, count: int) -> None:
    assert len(violations(parity_of(**row), {"fp32": limits})) == count


FAULTS: dict[str, Callable[[Scores], Scores]] = {
    "halved": lambda scores: scores * 0.5,
    "shifted": lambda scores: scores + 0.3,
    "one far off": lambda scores: np.where(scores == scores.max(), 9.0, scores),
}


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("fault", ["halved", "reversed", "all equal"])
def test_faults_of_scores_that_hardly_vary_are_found(precision: str, fault: str) -> None:
    pairs = [(f"question {number // 4}", f"answer {number}") for number in range(400)]
    reference = np.linspace(0.4, 0.40001, 400, dtype=np.float32)
    wrong = {"halved": (reference + 0.4) / 2, "reversed": reference[::-1], "all equal": 0 * reference + 0.4}
    row = measure(reference, np.asarray(wrong[fault], np.float32), pairs, np.arange(400))
    assert any("relative error" in found for found in violations({"precisions": {precision: row}}, LIMITS))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_keep_the_order_are_found(precision: str, fault: str) -> None:
    pairs = [(f"question {number // 4}", f"answer {number}") for number in range(400)]
    reference = np.linspace(0, 1, 400, dtype=np.float32)
    row = measure(reference, FAULTS[fault](reference).astype(np.float32), pairs, np.arange(400))
    assert (row["spearman"], row["winner_agreement"]) == (pytest.approx(1.0), 1.0)
    (found,) = violations({"precisions": {precision: row}}, LIMITS)
    assert found.startswith(f"{precision}: relative error ")


def test_scores_that_are_all_equal_have_no_relative_error() -> None:
    row = measure(
        floats([0.5] * 8), floats([0.5] * 8), [("question", f"{number}") for number in range(8)], np.arange(8)
    )
    assert row["relative_error"] is None


@pytest.mark.parametrize("limits", [*LIMITS.values(), Limits(min_winner_agreement=0.9), Limits()], ids=str)
@pytest.mark.parametrize("strange", [("reference",), ("scores",), ("reference", "scores")], ids=" and ".join)
def test_one_nan_among_many_scores_that_agree_never_passes(limits: Limits, strange: tuple[str, ...]) -> None:
    pairs = [(f"question {number // 4}", f"answer {number}") for number in range(400)]
    given = {name: np.linspace(0, 1, 400, dtype=np.float32) for name in ("reference", "scores")}
    row = measure(**given, pairs=pairs, counts=np.arange(400))
    assert violations({"precisions": {"fp32": row}}, {"fp32": limits}) == []
    for name in strange:
        given[name][399] = np.nan  # the best by rank, and by argmax
    row = measure(**given, pairs=pairs, counts=np.arange(400))
    assert row["worst"][0]["pair"] == 399
    report = {"precisions": {"fp32": row}}
    assert violations(report, {"fp32": limits}) == ["fp32: a score is not a finite number"]
    with pytest.raises(ParityError, match="not a finite number"):
        require(report, {"fp32": limits}, "something")


def test_an_infinite_score_never_passes_by_its_rank() -> None:
    pairs = [("question", f"answer {number}") for number in range(400)]
    reference = np.linspace(0, 1, 400, dtype=np.float32)
    scores = reference.copy()
    scores[-1] = np.inf
    row = measure(reference, scores, pairs, np.arange(400))
    assert violations({"precisions": {"int8": row}}, LIMITS) == ["int8: a score is not a finite number"]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("precisions", "fp32"), "fp32"),
        (("precisions", "fp32", "without_kernels"), "fp32 without kernels"),
        (("targets", "cuda", "fp32"), "fp32 of cuda"),
        (("targets", "tensorrt", "fp32"), "fp32 of tensorrt"),
    ],
)
def test_every_model_of_a_report_must_keep_its_limits(place: tuple[str, ...], name: str) -> None:
    good = {"max_error": 0.0, "relative_error": 0.0, "spearman": 1.0, "winner_agreement": 1.0}
    report: dict[str, Any] = {
        "precisions": {"fp32": {**good, "without_kernels": {**good}}, "int8": {**good}},
        "targets": {"cuda": {"fp32": {**good}}, "tensorrt": {"fp32": {**good}, "int8": {**good}}},
    }
    assert violations(report, LIMITS) == []
    row = report
    for key in place:
        row = row[key]
    row["max_error"] = 0.5
    assert violations(report, LIMITS) == [f"{name}: max error 0.5 is above 0.0001"]


def test_pairs_are_scored_once_alone_together_and_padded() -> None:
    session = FakeSession()
    with fake_scorer(session) as scorer:
        pairs = default_pairs()[:120]
        scored, shapes = score_in_shapes(scorer, pairs)
        ran = list(session.batches)
        expected = scorer.score_pairs(pairs)
    for name in ("scores", "token_counts", "truncated"):
        np.testing.assert_array_equal(getattr(scored, name), getattr(expected, name))
    assert sum(len(batch["input_ids"]) for batch in ran) == len(pairs)
    assert shapes == len({batch["input_ids"].shape for batch in ran})
    alone = [batch for batch in ran if len(batch["input_ids"]) == 1]
    padded = [batch for batch in ran if not batch["attention_mask"].all()]
    assert len(alone) >= len(pairs) // 3
    assert max(batch["input_ids"].size for batch in padded) > 1024


def test_padding_is_measured_where_the_scorer_avoids_it() -> None:
    session = FakeSession()
    tokenizer = PairTokenizer.from_file(TINY / "tokenizer.json", max_length=512)
    with Scorer(tokenizer, Dispatcher(session, Grouping(512, "avoided"), pad_token_id=1)) as scorer:
        score_in_shapes(scorer, default_pairs()[:60])
    assert any(not batch["attention_mask"].all() for batch in session.batches)


def test_pairs_are_described_by_a_digest_of_each_and_by_groups_that_compete() -> None:
    pairs = [("a", "1"), ("b", "2"), ("c", "3")]
    reference = Reference(np.zeros(3, np.float32), np.full(3, 5), np.zeros(3, np.bool_))
    others = [pairs, pairs[::-1], [*pairs[:2], ("c", "4")], [("", "a1"), *pairs[1:]]]
    assert len({describe_pairs(each, reference, "mine")["sha256"] for each in others}) == len(others)
    again = [describe_pairs(list(pairs), reference, name)["sha256"] for name in ("mine", "yours")]
    groups = [describe_pairs(each, reference, "mine")["groups"] for each in (pairs, [*pairs[:2], ("a", "3")])]
    assert groups == [0, 1]
    assert again[0] == again[1] == hashlib.sha256(b'[["a", "1"], ["b", "2"], ["c", "3"]]').hexdigest()


def test_a_violation_is_a_parity_error_that_holds_the_report() -> None:
    parity = parity_of(max_error=0.5)
    with pytest.raises(ParityError, match=r"fp32: max error 0\.5 is above 0\.0001") as caught:
        require(parity, LIMITS, "something")
    assert caught.value.report is parity
