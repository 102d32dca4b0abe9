"""PyTorch's scores are those of the pairs that were given, whatever holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cappy_engine.errors import InvalidPair
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.proof.reference import Reference, score_checkpoint, score_with_torch
from tests.support.columns import Series


def test_pairs_are_gone_through_once(checkpoint: Path) -> None:
    pairs = [("Is it?", "Yes"), ("Is it?", "No"), ("Is it?", "Yes")]
    expected = score_checkpoint(checkpoint, pairs)
    assert expected[0] == expected[2] != expected[1]
    for held in (iter(pairs), np.array(pairs), Series(pairs)):
        np.testing.assert_array_equal(score_checkpoint(checkpoint, held), expected)  # type: ignore[arg-type]
    with pytest.raises(InvalidPair, match="pair 1: expected a tuple"):
        score_checkpoint(checkpoint, [("a", "b"), ("a",)])


def test_pairs_are_cut_at_the_length_that_was_asked_for(checkpoint: Path) -> None:
    """So are those of a bundle that was exported with this length."""
    pair, [whole] = ("word " * 100, "yes"), score_checkpoint(checkpoint, [("word " * 100, "yes")])
    reference = score_with_torch(open_checkpoint(checkpoint), [pair], max_length=16)
    [found] = score_checkpoint(checkpoint, [pair], max_length=16)
    assert reference.token_counts.tolist() == [16]
    assert found == reference.scores[0] != whole


def test_the_spread_of_large_scores_is_a_number() -> None:
    scores = np.array([-3e22, 3e22], np.float32)
    assert Reference(scores, np.array([5, 5]), np.array([False, False])).spread == pytest.approx(3e22)
