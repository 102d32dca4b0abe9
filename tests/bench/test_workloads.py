"""Workloads are the same from the same seed, and have the lengths that they promise."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import lognorm

from cappy_bench.speed import measure as measuring
from cappy_bench.speed.run_options import SUITES, RunOptions
from cappy_bench.speed.suite import Plan
from cappy_bench.speed.texts import POOL, choose_pool, make_pool, read_pool
from cappy_bench.speed.workloads import (
    DESCRIPTIONS,
    LENGTHS,
    Pool,
    Sizes,
    Workload,
    bulk_lengths,
    make_workloads,
    question_lengths,
)
from cappy_engine.bulk.formats.lines import MAX_LINE_BYTES
from cappy_engine.bundle import seal
from cappy_engine.errors import BenchmarkError
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import copy_bundle
from tests.support.fake_tools import SIZES
from tests.support.places import ROOT

TEXTS = make_pool(["one", "two", "three", "four"], seed=1, count=400)


def test_workloads_are_the_same_from_the_same_seed_and_others_from_another(tokenizer: PairTokenizer) -> None:
    first, again, other = (make_workloads(TEXTS, tokenizer, SIZES, seed=seed) for seed in (0, 0, 1))
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
    sizes = Sizes(interactive=20, lengths=3, rerank=3, bulk=400, long=10, questions=20)
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
    assert found["long"].token_counts.min() >= 478
    counts = tokenizer.encode(pool).lengths
    assert found["interactive"].token_counts.max() <= counts[: len(pool) // 4].max(), "as of the first pairs, real ones"
    of_instructions = {instruction: count for (instruction, _), count in zip(pool, counts, strict=True)}
    assert all(25 <= of_instructions[request[0][0]] <= 155 for request in found["rerank"].requests)
    assert {len({pair[0] for pair in request}) for request in found["rerank"].requests} == {1}
    assert {len({pair[1] for pair in request}) for request in found["rerank"].requests} == {16}


def test_a_pool_that_is_too_small_is_a_clear_error(tokenizer: PairTokenizer) -> None:
    with pytest.raises(BenchmarkError, match="only 3 pairs"):
        make_workloads([("a", "b"), ("c", "d"), ("e", "f")], tokenizer, SIZES, seed=0)


def test_texts_with_two_answers_are_measured_without_rerank_and_with_it_told_what_to_do(
    tokenizer: PairTokenizer,
) -> None:
    """As in data of a classification."""
    pool = [(first, ("positive", "negative")[place % 2]) for place, (first, _) in enumerate(TEXTS)]
    problem = "rerank needs 16 different responses of less than 200 characters, and the texts have 2; leave it out"
    with pytest.raises(BenchmarkError, match=f"{problem}: --workload interactive --workload lengths --workload bulk"):
        make_workloads(pool, tokenizer, SIZES, seed=0)
    found = make_workloads(pool, tokenizer, SIZES, seed=0, wanted=["interactive", "bulk"])
    assert [one.name for one in found] == ["interactive", "bulk"]
    assert all(len(one.pairs) == len(set(one.pairs)) for one in found)


def test_a_workload_is_the_same_with_others_and_alone(tokenizer: PairTokenizer) -> None:
    every = make_workloads(TEXTS, tokenizer, SIZES, seed=0)
    alone = [make_workloads(TEXTS, tokenizer, SIZES, seed=0, wanted=[one.name]) for one in every]
    assert [[one.sha256 for one in found] for found in alone] == [[one.sha256] for one in every]


def test_a_workload_that_is_left_out_takes_no_pairs_where_there_are_few(tokenizer: PairTokenizer) -> None:
    """150 pairs are enough for the quick suite's bulk, which needs 128, but not for what comes before it, too."""
    sizes = SUITES["quick"][1]
    with pytest.raises(BenchmarkError, match="only 150 pairs"):
        make_workloads(TEXTS[:150], tokenizer, sizes, seed=0)
    bulk, *_ = make_workloads(TEXTS[:150], tokenizer, sizes, seed=0, wanted=["bulk"])
    assert len(bulk.pairs) == len(set(bulk.pairs)) == 128
    with pytest.raises(BenchmarkError, match="only 127 pairs"):
        make_workloads(TEXTS[:127], tokenizer, sizes, seed=0, wanted=["bulk"])


def test_no_pair_is_longer_than_the_bundle_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def stop(plan: Plan, **others: object) -> None:
        plans.append(plan)
        raise KeyboardInterrupt

    copy = copy_bundle(tmp_path / "bundle")
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["model"]["max_length"] = 128
    (copy / "manifest.json").write_text(json.dumps(seal(manifest)))
    monkeypatch.setattr(measuring, "run_suite", stop)
    pairs = ROOT / "export" / "cappy_export" / "proof" / "parity_pairs.jsonl"
    options = RunOptions(
        bundle=copy, suite="smoke", pairs=pairs, work=tmp_path / "work", out=tmp_path / "result.json", threads=1
    )
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(options, say=lambda line: None)
    (plan,) = plans
    assert plan.model.max_length == 128
    assert 100 < max(one.token_counts.max() for one in plan.workloads) <= 128


def test_texts_that_were_asked_for_and_are_not_there_are_an_error_and_not_made_up(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(BenchmarkError, match=r"empty\.jsonl holds no pairs; a line is"):
        choose_pool(empty, None, seed=0)
    with pytest.raises(BenchmarkError, match=r"has no texts: promptsource_test\.jsonl\.gz and bigbench/\*_train"):
        choose_pool(None, tmp_path / "nowhere", seed=0)


def test_a_pool_gives_the_nearest_pair_and_none_twice_nor_one_that_is_too_long(tokenizer: PairTokenizer) -> None:
    pairs = [(" ".join(["sky"] * count), f"blue {count}") for count in (1, 3, 5, 30, 31, 90, 700)]
    lengths = {pair: int(count) for pair, count in zip(pairs, tokenizer.encode(pairs).lengths, strict=True)}
    left, wanted = pairs[:-1], [512, 40, 40, 1, 8, 8]
    pool, expected = Pool(pairs, tokenizer), []
    for length in wanted:
        nearest = min(left, key=lambda pair: abs(lengths[pair] - length))
        left = [pair for pair in left if pair != nearest]
        expected.append(nearest)
    assert pool.take(wanted) == expected
    with pytest.raises(BenchmarkError, match="only 6 pairs that fit"):
        pool.take([512])


def test_short_responses_are_the_different_ones_of_less_than_200_characters(tokenizer: PairTokenizer) -> None:
    responses = ["b" * 200, "a" * 199, "Yes", "", "Yes"]
    pool = Pool([(f"Is it {place}?", response) for place, response in enumerate(responses)], tokenizer)
    assert pool.short_responses() == ["Yes", "a" * 199]


def test_a_length_stands_for_the_median_of_its_pairs() -> None:
    counts = [number * length for length in LENGTHS for number in (1, 2, 6)]
    assert Workload("lengths", (), np.array(counts)).steps == [2 * length for length in LENGTHS]


def test_lengths_are_drawn_as_the_report_says() -> None:
    """Medians and 95th percentiles by scipy's lognormal distribution; questions have 16 tokens besides the answer."""
    for draw, spread, middle, added in ((bulk_lengths, 0.885, 70, 0), (question_lengths, 0.775, 100, 16)):
        drawn = np.array(draw(np.random.default_rng(0), 50_000))
        for share in (0.05, 0.5, 0.95):
            expected = added + lognorm.ppf(share, spread, scale=middle)
            assert np.quantile(drawn, share) == pytest.approx(expected, rel=0.03, abs=1)
        assert 0 < drawn.min() < drawn.max() == 512
    questions = question_lengths(np.random.default_rng(0), 50_000)
    assert np.mean(questions) == pytest.approx(147, rel=0.02)
    assert np.percentile(questions, (50, 95)) == pytest.approx((115, 372), rel=0.02)
    assert np.percentile(bulk_lengths(np.random.default_rng(0), 50_000), (50, 95)) == pytest.approx((70, 300), rel=0.03)


def test_a_workload_tells_its_counts(workloads: list[Workload], tokenizer: PairTokenizer) -> None:
    for workload in workloads:
        counts = tokenizer.encode([pair for request in workload.requests for pair in request]).lengths.tolist()
        found = workload.describe()
        hundredths = statistics.quantiles(counts, n=100, method="inclusive")
        assert workload.token_counts.tolist() == counts
        assert (found["pairs"], found["tokens"]) == (len(counts), sum(counts))
        assert found["requests"] == len(workload.requests)
        expected = {"p5": hundredths[4], "p50": hundredths[49], "p95": hundredths[94], "max": max(counts)}
        assert found["lengths"] == pytest.approx(expected)


def test_candidates_of_a_request_are_distinct_and_have_one_instruction(tokenizer: PairTokenizer) -> None:
    pairs = [(f"Is it {place}?", f"answer {place}") for place in range(17)]
    (rerank,) = make_workloads(pairs, tokenizer, Sizes(0, 0, 3, 0, 0), seed=0)
    for request in rerank.requests:
        assert len({instruction for instruction, _ in request}) == 1
        assert len({response for _, response in request}) == len(request) == 16


def test_made_up_texts_are_those_that_numpy_draws_from_the_list() -> None:
    """Results depend on them, so they must not change with how they are drawn."""
    words, random = ["sky", "blue", "is", "a", "question"], np.random.default_rng(3)
    expected = []
    for most in [110] * 5 + [450] * 15:
        first = " ".join(random.choice(words, random.integers(3, most)))
        expected.append((first, " ".join(random.choice(words, random.integers(1, 12)))))
    assert make_pool(words, seed=3, count=20) == expected


def write_packed(path: Path, *rows: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows), 1))


def test_a_pool_of_real_texts_has_usual_pairs_first_and_long_ones_later(tmp_path: Path) -> None:
    assert read_pool(tmp_path, seed=0) == []
    write_packed(tmp_path / "promptsource_test.jsonl.gz", {"instruction": " a", "response": "b ", "label": 1})
    write_packed(tmp_path / "bigbench" / "x_train.jsonl.gz", {"instruction": "c", "references": ["d", "e"]})
    assert read_pool(tmp_path, seed=0) == [("a", "b"), ("c", "d")]


def test_a_pool_of_usual_texts_alone_has_as_many_of_them_as_it_holds(tmp_path: Path) -> None:
    count = POOL // 4 + 10
    write_packed(
        tmp_path / "promptsource_test.jsonl.gz", *({"instruction": f"a {n}", "response": "b"} for n in range(count))
    )
    assert len(set(read_pool(tmp_path, seed=0))) == count


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
