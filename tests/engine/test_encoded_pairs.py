"""What is known of encoded pairs: where their second text begins, which tokenizer made them, which are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import BundleError
from cappy_engine.scored import Scored
from cappy_engine.testing import fake_scorer
from cappy_engine.tokenizer import PairTokenizer

PAIRS = [("Is the sky blue?", "Yes"), ("Is the sky blue? " + "really " * 40, "No"), ("", "No")]


def test_types_of_special_tokens_that_no_template_tells_are_refused(bundle: Path) -> None:
    """The first </s> has the type of the second text, which begins behind another one."""
    unusual = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    unusual.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s>:0 </s>:1 $A:0 </s>:0 $B:1 </s>:1",
        special_tokens=[(name, unusual.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    with pytest.raises(BundleError, match="joins a pair in an unknown way"):
        PairTokenizer(unusual, max_length=64)


@pytest.mark.parametrize("known", [0, 1])
def test_joined_pairs_are_of_the_tokenizer_that_any_part_tells(known: int, tokenizer: PairTokenizer) -> None:
    parts = [dataclasses.replace(tokenizer.encode([("Is it so?", "Yes")]), tokenizer=None) for _ in range(2)]
    parts[known] = tokenizer.encode([("Is it so?", "Yes")])
    assert EncodedPairs.joined(parts).tokenizer == tokenizer.digest


@pytest.mark.parametrize("make", [np.array, list, tuple])
def test_a_mask_chooses_the_pairs_where_it_is_true(make: Callable[[list[bool]], Any], tokenizer: PairTokenizer) -> None:
    scorer, encoded = fake_scorer(tokenizer=tokenizer), tokenizer.encode(PAIRS)
    for mask in ([True, False, True], [False, True, True], [True] * 3, [False] * 3):
        places = np.flatnonzero(mask).tolist()
        chosen = encoded.chosen(make(mask))
        assert chosen.lengths.tolist() == encoded.lengths[mask].tolist()
        assert chosen.without_instruction == tuple(place for place, row in enumerate(places) if row == 2)
        expected = scorer.score([PAIRS[place] for place in places])
        assert scorer.score_encoded(chosen).scores.tolist() == expected.tolist()


@pytest.mark.parametrize("rows", [[2, 0, 2], (2, 0, 2), np.array([2, 0, 2], np.uint8), [np.int32(2), 0, 2]])
def test_places_choose_pairs_in_their_order_and_again(rows: Any, tokenizer: PairTokenizer) -> None:
    encoded = tokenizer.encode(PAIRS)
    chosen = encoded.chosen(rows)
    assert chosen.lengths.tolist() == encoded.lengths[[2, 0, 2]].tolist()
    assert chosen.without_instruction == (0, 2)


@pytest.mark.parametrize("rows", [[], (), np.array([], np.int64), range(0)])
def test_no_places_choose_no_pairs(rows: Any, tokenizer: PairTokenizer) -> None:
    for encoded in (tokenizer.encode(PAIRS), tokenizer.encode([])):
        assert len(encoded.chosen(rows)) == 0
    assert len(tokenizer.encode([]).chosen(np.array([], np.bool_))) == 0


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([0.9], r"rows must be places, or a mask of all 3 pairs, got list \[0.9\]"),
        (np.array([0.0, 1.0]), "rows must be places, or a mask of all 3 pairs, got ndarray"),
        ([True, False], r"or a mask of all 3 pairs, got list \[True, False\]"),
        (np.zeros(0, np.bool_), "or a mask of all 3 pairs, got ndarray"),
        (np.ones((3, 1), np.bool_), "or a mask of all 3 pairs, got ndarray"),
        ([[0, 1]], "rows must be places"),
        (["0"], "rows must be places"),
        ([None], "rows must be places"),
        (1, "rows must be places, or a mask of all 3 pairs, got int 1"),
        ([0, -1], "rows must be places of these 3 pairs, counted from 0, got -1"),
        ([0, 3], "rows must be places of these 3 pairs, counted from 0, got 3"),
        (np.array([2**64 - 1], np.uint64), "counted from 0, got 18446744073709551615"),
    ],
)
def test_what_names_no_pair_is_refused(rows: Any, problem: str, tokenizer: PairTokenizer) -> None:
    with pytest.raises(ValueError, match=problem):
        tokenizer.encode(PAIRS).chosen(rows)


def test_nothing_is_not_joined(tokenizer: PairTokenizer) -> None:
    with pytest.raises(ValueError, match="joined needs the pairs of at least one call, got none"):
        EncodedPairs.joined([])
    with pytest.raises(ValueError, match="joined needs the scores of at least one call, got none"):
        Scored.joined([])


def test_what_is_encoded_and_what_is_scored_equal_only_themselves(tokenizer: PairTokenizer) -> None:
    encoded, again = tokenizer.encode(PAIRS), tokenizer.encode(PAIRS)
    scorer = fake_scorer(tokenizer=tokenizer)
    scored = scorer.score_encoded(encoded)
    for one, other in ((encoded, again), (scored, scorer.score_encoded(encoded))):
        assert one == one
        assert one != other
        assert len({one, other, one}) == 2


def test_a_changed_result_changes_no_later_scores(tokenizer: PairTokenizer) -> None:
    scorer, encoded = fake_scorer(tokenizer=tokenizer), tokenizer.encode(PAIRS)
    scored = scorer.score_encoded(encoded)
    before = [scored.scores.tolist(), scored.token_counts.tolist(), scored.truncated.tolist()]
    scored.token_counts[:] = 1
    scored.truncated[:] = True
    scored.scores[:] = 0
    again = scorer.score_encoded(encoded)
    assert [again.scores.tolist(), again.token_counts.tolist(), again.truncated.tolist()] == before
