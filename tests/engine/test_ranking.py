"""Candidates are ranked by their scores; where int8 could decide wrongly, fp32 does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine import Candidate, Scorer
from cappy_engine.errors import InvalidPair, PrecisionUnavailable
from cappy_engine.ranking import best_first, first_best, near_best
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import change_manifest, copy_bundle, keep_precisions, read_manifest, with_value
from tests.support.columns import ArrowScalar, Once, Series
from tests.support.places import parity_pairs

TOLERANCE = 1e-5
FEW = parity_pairs()[::6]


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


def test_an_exact_winner_is_fp32s_and_only_near_candidates_are_scored_again(bundle: Path, scorer: Scorer) -> None:
    error = read_manifest(bundle)["parity"]["precisions"]["int8"]["max_error"]
    with Scorer.open(bundle, device="cpu", precision="int8") as opened:
        for instruction in ("Is the sky blue?", "Name a fruit.", ""):
            candidates = [f"{response} {place}" for place, (_, response) in enumerate(FEW[:12])]
            plain = opened.rank(instruction, candidates)
            ranked = opened.rank(instruction, candidates, exact_winner=True)
            exact = scorer.rank(instruction, candidates)
            assert ranked[0].index == exact[0].index
            near = {candidate.index for candidate in plain if candidate.score >= plain[0].score - 2 * error}
            assert {candidate.index for candidate in ranked if candidate.is_exact} == (near if len(near) > 1 else set())
            by_index = {candidate.index: candidate.score for candidate in exact}
            for candidate in ranked[: len(near)]:
                if candidate.is_exact:
                    assert candidate.score == pytest.approx(by_index[candidate.index], abs=TOLERANCE)
            assert sorted(candidate.index for candidate in ranked) == list(range(len(candidates)))


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
