"""Rows get raw scores, or their sigmoids; raw scores choose the winner, and a run goes on with what it began with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.errors import OutputError
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import pairs_of, run, stopped, write_rows

SIGMOID = ScoreTask(activation="sigmoid")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def test_a_score_is_the_sigmoid_of_the_raw_one(tmp_path: Path, scorer: Scorer) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs_of(20))
    run(scorer, source, tmp_path / "raw.jsonl")
    run(scorer, source, tmp_path / "out.jsonl", task=SIGMOID)
    raw = [row["score"] for row in lines_of(tmp_path / "raw.jsonl")]
    assert [row["score"] for row in lines_of(tmp_path / "out.jsonl")] == pytest.approx([*map(sigmoid, raw)])
    assert len(set(raw)) > 1


def test_a_parquet_file_gets_the_same(tmp_path: Path, scorer: Scorer) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    source = write_rows(tmp_path / "in.jsonl", pairs_of(20))
    for form in ("jsonl", "parquet"):
        run(scorer, source, tmp_path / f"out.{form}", task=SIGMOID)
    table = pq.read_table(tmp_path / "out.parquet")
    expected = [row["score"] for row in lines_of(tmp_path / "out.jsonl")]
    assert table["score"].to_pylist() == pytest.approx(expected, abs=1e-7)


def test_rank_tells_the_sigmoids_and_how_far_they_are_apart(tmp_path: Path, scorer: Scorer) -> None:
    rows = [{"instruction": "Is the sky blue?", "candidates": ["Yes", "No, it is not", "Maybe"]}]
    run(scorer, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", task=RankTask(activation="sigmoid"))
    (made,) = lines_of(tmp_path / "out.jsonl")
    ranked = scorer.rank("Is the sky blue?", rows[0]["candidates"], activation="sigmoid")
    assert (made["winner"], made["winner_index"]) == (ranked[0].response, ranked[0].index)
    assert made["scores"] == [each.score for each in sorted(ranked, key=lambda each: each.index)]
    assert made["margin"] == ranked[0].score - ranked[1].score


def test_raw_scores_choose_the_winner_where_sigmoids_are_equal(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    large = fake_scorer(FakeSession(lambda ids: 100.0 + len(ids)), tokenizer=tokenizer)
    rows = [{"instruction": "Is the sky blue?", "candidates": ["Yes", "No, it is not"]}]
    run(large, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", task=RankTask(activation="sigmoid"))
    (made,) = lines_of(tmp_path / "out.jsonl")
    assert (made["winner"], made["scores"], made["margin"]) == ("No, it is not", [1.0, 1.0], 0.0)


def test_a_run_goes_on_with_the_activation_that_it_began_with_only(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs_of(60))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(scorer, source, whole, task=SIGMOID)
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, task=SIGMOID))
    with pytest.raises(OutputError, match="activation was sigmoid, is identity"):
        run(scorer, source, out, resume=True)
    run(scorer, source, out, task=SIGMOID, resume=True)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("task", [ScoreTask, RankTask])
def test_another_activation_is_refused(task: Any) -> None:
    with pytest.raises(ValueError, match="unknown activation 'softmax'; choose from identity, sigmoid"):
        task(activation="softmax")
