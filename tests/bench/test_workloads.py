"""Workloads are the same from the same seed, and have the lengths that they promise."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from cappy_bench.speed.texts import make_pool, read_pool
from cappy_bench.speed.workloads import DESCRIPTIONS, LENGTHS, Sizes, make_workloads
from cappy_engine.bulk.lines import MAX_LINE_BYTES
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
    sizes = Sizes(interactive=20, lengths=3, rerank=3, bulk=400, long=10, padded=4, questions=20)
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


def write_packed(path: Path, *rows: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows), 1))


def test_a_pool_of_real_texts_has_usual_pairs_first_and_long_ones_later(tmp_path: Path) -> None:
    assert read_pool(tmp_path, seed=0) == []
    write_packed(tmp_path / "promptsource_test.jsonl.gz", {"instruction": " a", "response": "b ", "label": 1})
    write_packed(tmp_path / "bigbench" / "x_train.jsonl.gz", {"instruction": "c", "references": ["d", "e"]})
    assert read_pool(tmp_path, seed=0) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("promptsource_test.jsonl.gz", ["instruction"], "line 1: expected a JSON object"),
        ("promptsource_test.jsonl.gz", {"instruction": "a"}, "line 1: has no field 'response'"),
        ("bigbench/x_train.jsonl.gz", {"instruction": "a", "references": "b"}, "line 1: needs 'references', a list"),
        ("bigbench/x_train.jsonl.gz", {"instruction": "a", "references": [1]}, "line 1: needs 'references', a list"),
        ("bigbench/x_train.jsonl.gz", "a" * MAX_LINE_BYTES, "line 1: is longer than 16777216 bytes"),
    ],
)
def test_a_bad_line_of_a_pool_is_named(name: str, row: object, problem: str, tmp_path: Path) -> None:
    write_packed(tmp_path / name, row)
    with pytest.raises(BenchmarkError, match=f"{name}, {problem}"):
        read_pool(tmp_path, seed=0)
