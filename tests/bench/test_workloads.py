"""Workloads are the same from the same seed, and have the lengths that they promise."""

from __future__ import annotations

import numpy as np
import pytest

from cappy_bench.speed.workloads import DESCRIPTIONS, LENGTHS, Sizes, make_pool, make_workloads
from cappy_engine.errors import BenchmarkError
from cappy_engine.tokenizer import PairTokenizer
from tests.support.fake_tools import SIZES


def test_workloads_are_the_same_from_the_same_seed_and_others_from_another(tokenizer: PairTokenizer) -> None:
    pool = make_pool(["one", "two", "three", "four"], seed=1, count=400)
    first, again, other = (make_workloads(pool, tokenizer, SIZES, seed=seed) for seed in (0, 0, 1))
    assert [one.sha256 for one in first] == [one.sha256 for one in again]
    changed = {one.name for one, two in zip(first, other, strict=True) if one.sha256 != two.sha256}
    assert changed >= {
        "interactive",
        "rerank",
        "bulk",
    }  # few are near the lengths of the others, so they can be the same


@pytest.mark.slow
def test_workloads_have_the_lengths_they_promise(tokenizer: PairTokenizer) -> None:
    pool = make_pool([f"word{place}" for place in range(50)], seed=0)
    sizes = Sizes(interactive=20, lengths=3, rerank=3, bulk=400, long=10, padded=4)
    found = {workload.name: workload for workload in make_workloads(pool, tokenizer, sizes, seed=0)}
    assert list(found) == list(DESCRIPTIONS)
    encoded = {name: tokenizer.encode(workload.pairs) for name, workload in found.items()}
    for name, workload in found.items():
        assert encoded[name].lengths.tolist() == workload.token_counts.tolist()
        assert not encoded[name].truncated.any()
        assert all(text == text.strip() for pair in workload.pairs for text in pair)
    assert np.abs(found["lengths"].token_counts - np.repeat(LENGTHS, 3)).max() <= 8
    assert 60 <= np.median(found["bulk"].token_counts) <= 80
    assert 250 <= np.percentile(found["bulk"].token_counts, 95) <= 350
    assert found["long"].token_counts.min() > 450
    assert {len({pair[0] for pair in request}) for request in found["rerank"].requests} == {1}
    assert {len({pair[1] for pair in request}) for request in found["rerank"].requests} == {16}


def test_a_pool_that_is_too_small_is_a_clear_error(tokenizer: PairTokenizer) -> None:
    with pytest.raises(BenchmarkError, match="only 3 pairs"):
        make_workloads([("a", "b"), ("c", "d"), ("e", "f")], tokenizer, SIZES, seed=0)
