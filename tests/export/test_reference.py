"""PyTorch's scores are those of the pairs that were given, whatever holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cappy_engine.errors import InvalidPair
from cappy_export.proof.reference import score_checkpoint
from tests.support.columns import Series


def test_pairs_are_gone_through_once(checkpoint: Path) -> None:
    pairs = [("Is it?", "Yes"), ("Is it?", "No"), ("Is it?", "Yes")]
    expected = score_checkpoint(checkpoint, pairs)
    assert expected[0] == expected[2] != expected[1]
    for held in (iter(pairs), np.array(pairs), Series(pairs)):
        np.testing.assert_array_equal(score_checkpoint(checkpoint, held), expected)  # type: ignore[arg-type]
    with pytest.raises(InvalidPair, match="pair 1: expected a tuple"):
        score_checkpoint(checkpoint, [("a", "b"), ("a",)])
