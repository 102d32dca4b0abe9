"""The study of long pairs: made in the lengths that were asked for, and scored beside PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_bench.studies.long_pairs import compare, make_long_pairs
from cappy_engine.tokenizer import PairTokenizer


def test_pairs_have_the_lengths_that_were_asked_for_or_a_few_tokens_less(bundle: Path) -> None:
    tokenizer = PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512)
    pairs = list(make_long_pairs(tokenizer, count=4, shortest=64))
    found = tokenizer.encode(pairs)
    assert not found.truncated.any()
    for length, wanted in zip(found.lengths, (64, 128, 256, 512), strict=True):
        assert wanted - 20 <= length <= wanted
    assert pairs == list(make_long_pairs(tokenizer, count=4, shortest=64))


def test_each_precision_is_compared_with_pytorch(bundle: Path, checkpoint: Path) -> None:
    found = compare(bundle, checkpoint, count=3, shortest=64)
    assert len(found["tokens"]) == 3
    assert found["precisions"]["fp32"]["max_error"] < 1e-5
    assert found["precisions"]["fp32"]["spearman"] == pytest.approx(1)
    assert 0 < found["precisions"]["int8"]["max_error"] < found["deviation_of_scores"]
    assert found["precisions"]["fp32"]["peak_bytes"] > 2**20
