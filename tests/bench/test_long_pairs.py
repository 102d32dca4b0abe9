"""The study of long pairs: made in the lengths that were asked for, and scored beside PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cappy_bench.studies.long_pairs import compare, make_long_pairs
from cappy_engine.errors import BenchmarkError, CheckpointError
from cappy_engine.tokenizer import PairTokenizer


def test_pairs_have_the_lengths_that_were_asked_for_or_a_few_tokens_less(bundle: Path) -> None:
    tokenizer = PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512)
    pairs = list(make_long_pairs(tokenizer, count=4, shortest=64, longest=512))
    found = tokenizer.encode(pairs)
    assert not found.truncated.any()
    for length, wanted in zip(found.lengths, (64, 90, 154, 512), strict=True):
        assert wanted - 20 <= length <= wanted
    assert pairs == list(make_long_pairs(tokenizer, count=4, shortest=64, longest=512))


def test_each_precision_is_compared_with_pytorch(bundle: Path, checkpoint: Path) -> None:
    found = compare(bundle, checkpoint, count=3, shortest=64, longest=128)
    assert len(found["tokens"]) == 3
    assert 100 < max(found["tokens"]) <= 128
    assert found["precisions"]["fp32"]["max_error"] < 1e-5
    assert found["precisions"]["fp32"]["spearman"] == pytest.approx(1)
    assert 0 < found["precisions"]["int8"]["max_error"] < found["deviation_of_scores"]
    assert found["precisions"]["fp32"]["peak_bytes"] > 2**20


@pytest.mark.slow
def test_what_pytorch_scored_is_kept_and_not_scored_again(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    first = compare(bundle, checkpoint, count=2, shortest=64, kept=kept)
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert first["precisions"]["fp32"]["max_error"] < 1e-5

    ((name, score),) = json.loads(lines[0]).items()
    # As where a run was stopped, but for the score, which tells that it was not computed again.
    kept.write_text(json.dumps({name: score + 1}) + "\n", encoding="utf-8")
    again = compare(bundle, checkpoint, count=2, shortest=64, kept=kept)
    assert again["precisions"]["fp32"]["max_error"] == pytest.approx(1, abs=1e-5)
    assert kept.read_text(encoding="utf-8").splitlines()[1:] == lines[1:]


@pytest.mark.slow
def test_nothing_is_compared_with_a_score_of_pytorch_that_is_no_number(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    compare(bundle, checkpoint, count=2, shortest=64, kept=kept)
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    kept.write_text("".join(json.dumps(dict.fromkeys(line, float("nan"))) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="PyTorch itself gives nan for 2 pairs"):
        compare(bundle, checkpoint, count=2, shortest=64, kept=kept)


@pytest.mark.slow
def test_pytorchs_other_attention_gives_the_same_scores(bundle: Path, checkpoint: Path) -> None:
    found = compare(bundle, checkpoint, count=3, shortest=64, attention="sdpa")
    assert found["attention"] == "sdpa"
    assert found["precisions"]["fp32"]["max_error"] < 1e-5
    with pytest.raises(CheckpointError, match="none"):
        compare(bundle, checkpoint, count=3, shortest=64, attention="none")
