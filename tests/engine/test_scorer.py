"""Scores come back in input order, whatever they are scored with; a closed scorer scores nothing."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine import CappyError, Scorer
from cappy_engine.batching import Scores
from cappy_engine.errors import InvalidPair, ScoringError
from cappy_engine.inputs import position_ids
from cappy_engine.session import INPUTS
from cappy_engine.testing import FakeSession, fake_scorer, score_of
from cappy_engine.tokenizer import PairTokenizer
from tests.support.places import TINY_PRECISIONS, parity_pairs

TOLERANCE = 1e-5
PAIRS = parity_pairs()
FEW = PAIRS[::6]
LONG = "The sky is blue, and so on. " * 200


@pytest.fixture(scope="module")
def scorer(bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(bundle, device="cpu", precision="fp32") as opened:
        yield opened


@pytest.fixture(scope="module", params=TINY_PRECISIONS)
def any_scorer(bundle: Path, request: pytest.FixtureRequest) -> Iterator[Scorer]:
    with Scorer.open(bundle, device="cpu", precision=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(scorer: Scorer) -> Scores:
    """Score each of FEW by itself."""
    return np.concatenate([scorer.score([pair]) for pair in FEW])


# Scores


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(len(FEW))))
def test_scores_come_back_in_input_order(scorer: Scorer, alone: Scores, order: list[int]) -> None:
    scores = scorer.score([FEW[place] for place in order])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, alone[order], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), max_batch_tokens=st.sampled_from([1, 100, 513, 2000, 100_000]))
def test_a_score_does_not_depend_on_its_neighbours_or_the_budget(
    any_scorer: Scorer, seed: int, max_batch_tokens: int
) -> None:
    pairs = random.Random(seed).sample(PAIRS, 24)
    alone = np.concatenate([any_scorer.score([pair]) for pair in pairs[:6]])
    together = any_scorer.score_pairs(pairs, max_batch_tokens=max_batch_tokens).scores
    np.testing.assert_allclose(together[:6], alone, rtol=0, atol=TOLERANCE)


def test_no_pairs_give_no_scores(scorer: Scorer) -> None:
    scores = scorer.score([])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


def test_pairs_may_be_lists_or_come_from_a_generator(scorer: Scorer) -> None:
    expected = scorer.score(FEW)
    generator: Any = (pair for pair in FEW)
    np.testing.assert_array_equal(scorer.score([list(pair) for pair in FEW]), expected)
    np.testing.assert_array_equal(scorer.score(generator), expected)


def test_instruction_and_response_are_not_the_same(scorer: Scorer) -> None:
    there, back = scorer.score([("Name a fruit.", "A pear."), ("A pear.", "Name a fruit.")])
    assert abs(there - back) > 100 * TOLERANCE


def test_what_is_no_pair_is_refused_with_its_index(scorer: Scorer) -> None:
    pairs: list[Any] = [("a", "b"), ("a", "\ud800")]
    with pytest.raises(InvalidPair, match=r"^pair 1: response has a lone surrogate"):
        scorer.score(pairs)


def test_pairs_that_were_encoded_before_score_the_same(scorer: Scorer) -> None:
    encoded = scorer.encode([*FEW, *FEW[:3]])
    scored = scorer.score_encoded(encoded)
    np.testing.assert_array_equal(scored.scores, scorer.score([*FEW, *FEW[:3]]))
    assert scored.token_counts.tolist() == encoded.lengths.tolist()
    assert scored.truncated.tolist() == encoded.truncated.tolist()


# What the session sees


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.text("ab c", max_size=80), st.text("ab c", max_size=80)), max_size=30),
    max_batch_tokens=st.integers(1, 300),
)
def test_the_session_sees_batches_within_the_budget_longest_first_padded_on_the_right(
    tokenizer: PairTokenizer, pairs: list[tuple[str, str]], max_batch_tokens: int
) -> None:
    session = FakeSession()
    scores = fake_scorer(session, tokenizer=tokenizer, max_batch_tokens=max_batch_tokens).score(pairs)
    lengths = []
    for batch in session.batches:
        ids, mask, types, positions = (batch[name] for name in INPUTS)
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        assert ids.dtype == mask.dtype == types.dtype == positions.dtype == np.int64
        assert ids.shape == mask.shape == types.shape
        np.testing.assert_array_equal(positions, position_ids(ids, pad_token_id=1))
        assert ids.size <= max_batch_tokens or len(ids) == 1
        assert (ids[mask == 0] == 1).all()
        assert (ids[mask == 1] != 1).all()
        assert (np.diff(mask, axis=1) <= 0).all()
        assert mask[0].all()
        assert not types.any()
        lengths += mask.sum(axis=1).tolist()
    encoded = tokenizer.encode(pairs)
    distinct = {tuple(ids.tolist()) for ids in encoded.token_ids}
    assert lengths == sorted(map(len, distinct), reverse=True)  # the same pair is not scored twice
    assert scores.tolist() == [np.float32(score_of(ids.tolist())) for ids in encoded.token_ids]


def test_the_budget_of_one_call_replaces_the_scorers_own(tokenizer: PairTokenizer) -> None:
    session = FakeSession()
    opened = fake_scorer(session, tokenizer=tokenizer, max_batch_tokens=1)
    pairs = [("a", letter) for letter in "bcdefg"]
    opened.score_pairs(pairs, max_batch_tokens=10_000)
    opened.score_pairs(pairs)
    assert [len(batch["input_ids"]) for batch in session.batches] == [6] + [1] * 6


def test_progress_is_told_of_every_batch_without_padding(tokenizer: PairTokenizer) -> None:
    session, told = FakeSession(), list[tuple[int, int]]()
    scored = fake_scorer(session, tokenizer=tokenizer, max_batch_tokens=60).score_pairs(
        FEW, progress=lambda pairs, tokens: told.append((pairs, tokens))
    )
    assert told == [(len(batch["input_ids"]), int(batch["attention_mask"].sum())) for batch in session.batches]
    assert sum(tokens for _, tokens in told) == scored.token_counts.sum()
    assert len(told) > 1


def test_a_pair_that_comes_twice_is_scored_once(tokenizer: PairTokenizer) -> None:
    session, told = FakeSession(), list[tuple[int, int]]()
    pairs = [("a", "b"), ("c", "d"), ("a", "b"), ("a", "b")]
    scored = fake_scorer(session, tokenizer=tokenizer).score_pairs(pairs, progress=lambda *counts: told.append(counts))
    assert [len(batch["input_ids"]) for batch in session.batches] == [2]
    assert scored.scores[0] == scored.scores[2] == scored.scores[3] != scored.scores[1]
    assert told == [(4, int(scored.token_counts.sum()))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_score_is_an_error_that_names_the_pair(tokenizer: PairTokenizer, value: float) -> None:
    bad = tokenizer.encode([("Is it?", "The bad one")]).token_ids[0].tolist()
    session = FakeSession(lambda ids: value if ids == bad else 0.5)
    pairs = [("Is it?", "Yes"), ("Is it, at any rate?", "No"), ("Is it?", "The bad one"), ("Is it?", "Maybe")]
    with pytest.raises(ScoringError, match=rf"^pair 2: the model gave {value}, which is not a score$") as caught:
        fake_scorer(session, tokenizer=tokenizer).score(pairs)
    assert caught.value.index == 2


# Truncation


def test_truncation_is_reported_pair_by_pair(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scored = scorer.score_pairs([("short", "pair"), (LONG, "Yes"), ("short", LONG), (LONG, LONG)])
    assert scored.truncated.tolist() == [False, True, True, True]
    assert scored.token_counts.tolist()[1:] == [512, 512, 512]
    assert scored.token_counts[0] < 512
    assert not caplog.records  # the caller has it in hand


def test_score_logs_a_warning_with_the_count_and_the_first_truncated_pair(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cappy_engine"):
        scorer.score([("short", "pair"), ("short", LONG), (LONG, "Yes")])
    assert [record.getMessage() for record in caplog.records] == ["2 of 3 pairs were truncated, the first is pair 1"]


def test_score_logs_a_warning_for_empty_instructions_and_an_empty_response_is_an_answer(
    scorer: Scorer, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("Is it?", ""), ("", "Yes"), ("Is it?", "Yes"), ("", "")]
    with caplog.at_level(logging.WARNING, logger="cappy_engine"):
        scored = scorer.score_pairs(pairs)
        assert not caplog.records  # the caller has it in hand
        scores = scorer.score(pairs)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 pairs have an empty instruction, the first is pair 1"
    ]
    assert scored.without_instruction == (1, 3)
    np.testing.assert_array_equal(scores, scored.scores)
    assert np.isfinite(scores).all()
    encoded = scorer.encode([*pairs, *pairs])
    assert encoded.without_instruction == (1, 3, 5, 7)
    assert encoded.distinct()[0].without_instruction == (1, 3)


def test_rank_logs_a_warning_for_an_empty_instruction(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cappy_engine"):
        scorer.rank("", [])
        scorer.rank("Is it?", ["", "Yes"])
        assert not caplog.records
        assert len(scorer.rank("", ["Yes", "No"])) == 2
    assert [record.getMessage() for record in caplog.records] == ["the instruction is empty"]


def test_score_logs_nothing_where_nothing_was_truncated(scorer: Scorer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="cappy_engine"):
        scorer.score([("short", "pair")])
    assert not caplog.records


def test_a_ranked_candidate_tells_that_it_was_truncated(scorer: Scorer) -> None:
    ranked = scorer.rank("Is the sky blue?", ["Yes", LONG])
    assert {candidate.index: candidate.is_truncated for candidate in ranked} == {0: False, 1: True}


# Closing


def test_a_closed_scorer_refuses_to_score(bundle: Path) -> None:
    opened = Scorer.open(bundle, device="cpu")
    opened.score([("a", "b")])
    opened.close()
    opened.close()
    with pytest.raises(ScoringError, match=r"this scorer was closed; open another one with Scorer\.open"):
        opened.score([("a", "b")])
    with pytest.raises(CappyError):
        opened.rank("a", ["b"])


@pytest.mark.parametrize("call", [lambda scorer: scorer.score([]), lambda scorer: scorer.rank("a", [])])
def test_a_closed_scorer_refuses_even_nothing(bundle: Path, call: Callable[[Scorer], object]) -> None:
    opened = Scorer.open(bundle, device="cpu")
    opened.close()
    with pytest.raises(ScoringError, match="closed"):
        call(opened)


def test_leaving_the_context_closes_the_scorer_also_on_an_error(bundle: Path) -> None:
    opened = Scorer.open(bundle, device="cpu")
    with pytest.raises(InvalidPair), opened as entered:
        entered.rank("a", "b")
    assert entered is opened
    with pytest.raises(ScoringError, match="closed"):
        opened.score([("a", "b")])


def test_a_scorer_that_was_not_opened_from_a_bundle_has_no_info(tokenizer: PairTokenizer) -> None:
    with pytest.raises(AttributeError, match=r"not made by Scorer\.open"):
        _ = fake_scorer(tokenizer=tokenizer).info
