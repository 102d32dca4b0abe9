"""Candidates are ranked by their scores; where int8 could decide wrongly, fp32 does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Candidate, Scorer
from cappy_engine.errors import InvalidPair, PrecisionUnavailable
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import change_manifest, copy_bundle, keep_precisions, read_manifest, with_value
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
