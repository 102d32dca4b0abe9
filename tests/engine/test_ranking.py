"""Candidates are ranked by their scores; where int8 could decide wrongly, fp32 does."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine import Candidate, Scorer
from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import InvalidPair, PrecisionUnavailable, ScoringError
from cappy_engine.exact import ExactModel
from cappy_engine.ranking import best_first, first_best, near_best
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import change_manifest, copy_bundle, keep_precisions, with_value
from tests.support.columns import ArrowScalar, Once, Series
from tests.support.places import parity_pairs

TOLERANCE = 1e-5
CANDIDATES = [f"{response} {place}" for place, (_, response) in enumerate(parity_pairs()[::6][:12])]


@pytest.fixture(scope="module")
def scorer(bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(bundle, device="cpu", precision="fp32") as opened:
        yield opened


def test_ranking_is_by_score_best_first(scorer: Scorer) -> None:
    candidates = ["A pear", "granite", "", "A pear, of course", "ocean"]
    scores = scorer.score([("Name a fruit.", candidate) for candidate in candidates])
    ranked = scorer.rank("Name a fruit.", candidates)
    assert [candidate.index for candidate in ranked] == sorted(range(5), key=lambda place: -scores[place])
    for candidate in ranked:
        assert candidate.response == candidates[candidate.index]
        assert candidate.score == float(scores[candidate.index])


def test_the_first_candidate_wins_a_tie(tokenizer: PairTokenizer) -> None:
    best = tokenizer.encode([("q", "best")]).token_ids[0].tolist()
    session = FakeSession(lambda ids: 0.75 if ids == best else 0.25)
    candidates = ["long candidates run in another batch " * 3, "b", "best", "b", "c", "best"]
    ranked = fake_scorer(session, tokenizer=tokenizer, max_batch_tokens=16).rank("q", candidates)
    assert ranked == [Candidate(place, candidates[place], 0.75 if place in (2, 5) else 0.25, False)
                      for place in (2, 5, 0, 1, 3, 4)]  # fmt: skip


def test_no_candidates_give_an_empty_ranking(scorer: Scorer) -> None:
    assert scorer.rank("Is the sky blue?", []) == []


@pytest.mark.parametrize(
    "make",
    [
        Series,
        Once,
        iter,
        tuple,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        lambda texts: [ArrowScalar(text) for text in texts],
        lambda texts: dict.fromkeys(texts).keys(),
        lambda texts: dict(enumerate(texts)).values(),
    ],
)
def test_every_text_gets_its_own_score_whatever_holds_it(tokenizer: PairTokenizer, make: Callable[[Any], Any]) -> None:
    opened = fake_scorer(tokenizer=tokenizer)
    texts = ["granite", "A pear", "ocean", "Où?"]
    expected = opened.rank("Name a fruit.", texts)
    found = opened.rank("Name a fruit.", make(texts))
    assert found == expected
    assert {type(candidate.response) for candidate in found} == {str}
    by_text = dict(zip(texts, opened.score([("Name a fruit.", text) for text in texts]).tolist(), strict=True))
    assert {candidate.response: candidate.score for candidate in found} == by_text


def test_a_set_of_candidates_is_ranked(scorer: Scorer) -> None:
    ranked = scorer.rank("Name a fruit.", {"granite", "A pear", "ocean"})
    assert {candidate.response for candidate in ranked} == {"granite", "A pear", "ocean"}
    assert ranked[0].score == scorer.score([("Name a fruit.", ranked[0].response)])[0]


def test_places_are_those_of_the_iteration_whatever_holds_the_scores() -> None:
    scores = [0.2, 0.9, 0.85, 0.9]
    for make in (list, iter, Series, np.array):
        held: list[Any] = [make(scores) for _ in range(3)]
        assert first_best(held[0]) == 1
        assert near_best(held[1], 0.1) == [1, 2, 3]
        assert best_first(held[2], {2: 0.8, 3: 0.81}) == [3, 2, 1, 0]


def test_exact_winner_is_yes_or_no(scorer: Scorer) -> None:
    word: Any = "False"
    with pytest.raises(ValueError, match="exact_winner must be True or False, got str 'False'"):
        scorer.rank("Is it?", ["Yes"], exact_winner=word)


def test_one_string_as_candidates_is_refused(scorer: Scorer) -> None:
    with pytest.raises(InvalidPair, match="candidates must be a list of strings, got one str: 'Yes'"):
        scorer.rank("Is the sky blue?", "Yes")


def test_a_bad_candidate_is_refused_with_its_index(scorer: Scorer) -> None:
    candidates: list[Any] = ["Yes", "No", None]
    with pytest.raises(InvalidPair, match="must be a str") as caught:
        scorer.rank("Is the sky blue?", candidates)
    assert caught.value.index == 2


# Exact winners


def with_error(folder: Path, error: float) -> Path:
    """Copy the bundle to a new folder; its proof found this largest error of int8."""
    copy_bundle(folder)
    change_manifest(folder, with_value(error, "parity", "precisions", "int8", "max_error"))
    return folder


@pytest.fixture
def open_with_near(tmp_path: Path, bundle: Path) -> Iterator[Callable[[str, Sequence[str], int], Scorer]]:
    """Open the bundle in int8, with a largest error by which so many candidates of an instruction are near the best.

    int8's scores are not the same on every processor, so the error is found from them.
    """
    with contextlib.ExitStack() as opened:
        plain = opened.enter_context(Scorer.open(bundle, device="cpu", precision="int8"))

        def open_one(instruction: str, candidates: Sequence[str], count: int) -> Scorer:
            ranked = plain.rank(instruction, candidates)
            below = [ranked[0].score - candidate.score for candidate in ranked]
            copy = with_error(tmp_path / f"copy{count}{instruction}", (below[count - 1] + below[count]) / 4)
            return opened.enter_context(Scorer.open(copy, device="cpu", precision="int8"))

        yield open_one


@pytest.mark.parametrize(("instruction", "count"), [("Is the sky blue?", 3), ("Name a fruit.", 3), ("", 1)])
def test_an_exact_winner_is_fp32s_and_only_near_candidates_are_scored_again(
    instruction: str, count: int, scorer: Scorer, open_with_near: Callable[[str, Sequence[str], int], Scorer]
) -> None:
    """A candidate is near if it lies below the best by at most twice int8's largest error: both may be off."""
    opened = open_with_near(instruction, CANDIDATES, count)
    plain, exact = (each.rank(instruction, CANDIDATES) for each in (opened, scorer))
    ranked = opened.rank(instruction, CANDIDATES, exact_winner=True)
    near = [candidate.index for candidate in plain[:count]] if count > 1 else []
    rescored = [candidate for candidate in ranked if candidate.is_exact]
    in_fp32 = [candidate for candidate in exact if candidate.index in near]
    assert [candidate.index for candidate in rescored] == [candidate.index for candidate in in_fp32]
    np.testing.assert_allclose(
        [candidate.score for candidate in rescored], [candidate.score for candidate in in_fp32], atol=TOLERANCE
    )
    assert ranked == [*rescored, *(candidate for candidate in plain if candidate.index not in near)]


@pytest.mark.slow
def test_an_exact_winner_may_be_second_in_int8(tmp_path: Path, scorer: Scorer) -> None:
    found = 0
    with Scorer.open(with_error(tmp_path / "copy", 1.0), device="cpu", precision="int8") as opened:
        for instruction in ("", "Is the sky blue?", "Is it true?", "Why?"):
            for pair in itertools.combinations(CANDIDATES, 2):
                exact = scorer.rank(instruction, pair)[0].index
                if opened.rank(instruction, pair)[0].index != exact:
                    found += 1
                    assert opened.rank(instruction, pair, exact_winner=True)[0].index == exact
    assert found


def test_an_exact_winner_reckons_with_the_larger_error_of_kernels_and_of_none(tmp_path: Path) -> None:
    """The bundle runs on either, and its proof measured both."""
    folder = with_error(tmp_path / "copy", 0.0)
    for error, is_exact in ((0.0, False), (100.0, True)):
        row = {"max_error": error}
        change_manifest(folder, with_value(row, "parity", "precisions", "int8", "without_kernels"))
        with Scorer.open(folder, device="cpu", precision="int8") as opened:
            ranked = opened.rank("Is the sky blue?", CANDIDATES, exact_winner=True)
        assert {candidate.is_exact for candidate in ranked} == {is_exact}


def test_a_candidate_that_fails_in_fp32_alone_is_named(
    monkeypatch: pytest.MonkeyPatch, open_with_near: Callable[[str, Sequence[str], int], Scorer]
) -> None:
    def fail(model: ExactModel, encoded: EncodedPairs) -> Scores:
        assert len(encoded) == 2
        raise ScoringError("the model gave nan, which is not a score", 1)

    monkeypatch.setattr(ExactModel, "run", fail)
    opened = open_with_near("Is the sky blue?", CANDIDATES[:9], 2)
    near = sorted(candidate.index for candidate in opened.rank("Is the sky blue?", CANDIDATES[:9])[:2])
    with pytest.raises(ScoringError, match=f"^pair {near[1]}: the model gave nan") as caught:
        opened.rank("Is the sky blue?", CANDIDATES[:9], exact_winner=True)
    assert caught.value.index == near[1] > 1


def test_an_exact_winner_needs_nothing_more_in_fp32(scorer: Scorer) -> None:
    candidates = ["Yes", "No", "Perhaps"]
    assert scorer.rank("Is it?", candidates, exact_winner=True) == scorer.rank("Is it?", candidates)


def test_an_exact_winner_needs_an_fp32_model(tmp_path: Path) -> None:
    copy = keep_precisions(copy_bundle(tmp_path / "int8"), "int8")
    change_manifest(copy, with_value(100.0, "parity", "precisions", "int8", "max_error"))
    with (
        Scorer.open(copy, device="cpu") as opened,
        pytest.raises(PrecisionUnavailable, match="has no fp32 model"),
    ):
        opened.rank("Is it?", ["Yes", "No"], exact_winner=True)
