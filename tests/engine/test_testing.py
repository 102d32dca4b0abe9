"""The fakes that are shipped for users' tests do what their page and their examples say."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from cappy_engine import testing
from cappy_engine.errors import InvalidPair, PrecisionUnavailable, ScoringError
from cappy_engine.testing import FakeSession, fake_scorer, score_of
from cappy_engine.tokenizer import PairTokenizer

PAIRS = [("Is the sky blue?", "Yes"), ("Is the sky blue?", "No"), ("Name a fruit, and say why.", "A pear.")]


def test_its_examples_are_true() -> None:
    assert doctest.testmod(testing, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_a_fake_scorer_scores_the_same_pair_the_same_in_any_company() -> None:
    together = fake_scorer().score(PAIRS)
    assert len(set(together.tolist())) == len(PAIRS)
    assert [float(fake_scorer(max_batch_tokens=1).score([pair])[0]) for pair in PAIRS] == together.tolist()


def test_scores_follow_from_the_tokens_without_padding(tokenizer: PairTokenizer) -> None:
    session = FakeSession()
    scores = fake_scorer(session, tokenizer=tokenizer).score(PAIRS)
    expected = [score_of(ids.tolist()) for ids in tokenizer.encode(PAIRS).token_ids]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert session.shapes == [(3, int(tokenizer.encode(PAIRS).lengths.max()))]


def test_a_test_may_say_what_the_scores_are() -> None:
    ranked = fake_scorer(FakeSession(lambda ids: -float(len(ids)))).rank("q", ["a longer response", "short"])
    assert [candidate.response for candidate in ranked] == ["short", "a longer response"]


def test_a_session_fails_when_it_is_told_to() -> None:
    scorer = fake_scorer(FakeSession(fails_at=1), max_batch_tokens=1)
    scorer.score(PAIRS[:1])
    with pytest.raises(ScoringError, match="was told to fail"):
        scorer.score(PAIRS[:1])
    with pytest.raises(MemoryError, match="no memory"):
        fake_scorer(FakeSession(fails_at=0, error=MemoryError("no memory"))).score(PAIRS)


def test_pairs_are_checked_as_ever() -> None:
    with pytest.raises(InvalidPair, match="pair 0"):
        fake_scorer().score([("a", None)])  # type: ignore[list-item]


def test_there_is_no_exact_winner_without_an_fp32_model() -> None:
    with pytest.raises(PrecisionUnavailable, match="exact_winner needs an fp32 model, and this scorer was not made by"):
        fake_scorer().rank("Is the sky blue?", ["Yes", "No"], exact_winner=True)
