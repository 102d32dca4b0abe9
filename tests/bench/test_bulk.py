"""`cappy bench bulk` scores a file as users do, and compares that with the scorer alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cappy_bench.bulk.bulk_measure import rows, run_score, write_pairs
from cappy_bench.bulk.bulk_options import BulkBenchOptions
from cappy_engine.cli.main import main
from cappy_engine.errors import CappyError


@pytest.mark.slow
def test_bench_bulk_tells_pairs_a_second_their_share_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "--pairs 60 --sample 20 --threads 1 --format jsonl.gz --out new/folder/result.json --quiet".split()
    assert main(["bench", "bulk", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pairs"] == 60
    assert result["share_of_own"] == pytest.approx(result["pairs_per_second"] / result["own_pairs_per_second"])
    assert result["own_pairs_per_second"] == pytest.approx(result["own_pairs"] / sum(result["own_seconds"]))
    assert result["own_pairs"] == 40  # before and after
    assert result["chosen"] | {"kernels": ""} == {
        "precision": "int8",
        "threads": 1,
        "mode": "latency",
        "mode_reason": "one session",
        "max_batch_tokens": 512,
        "kernels": "",
    }
    assert 10e6 < result["peak_bytes"] < 1e9
    assert json.loads(Path("new/folder/result.json").read_bytes()) == result
    assert list(Path("bench/bulk").iterdir()) == []


@pytest.mark.slow
def test_the_command_is_stopped_for_what_comes_between_and_its_seconds_are_its_own(tmp_path: Path) -> None:
    options = BulkBenchOptions(pairs=50, every=0)
    source, scored, stops = tmp_path / "pairs.jsonl", tmp_path / "scored.jsonl", []
    write_pairs(source, options)

    def between() -> None:
        time.sleep(0.1)
        stops.append(scored.exists())

    begun = time.perf_counter()
    seconds, _ = run_score(source, scored, options, ["--threads", "1"], between)
    assert seconds < time.perf_counter() - begun - 0.1 * len(stops)
    assert stops
    assert len(scored.read_bytes().splitlines()) == 50


@pytest.mark.slow
@pytest.mark.parametrize("problem", [KeyboardInterrupt, CappyError])
def test_the_command_does_not_stay_stopped_when_what_comes_between_fails(
    problem: type[BaseException], tmp_path: Path
) -> None:
    """It would hold its memory, and whoever waits for it would wait for ever."""
    options = BulkBenchOptions(pairs=50, every=0)
    source = tmp_path / "pairs.jsonl"
    write_pairs(source, options)

    def between() -> None:
        raise problem

    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    with pytest.raises(problem):
        run_score(source, tmp_path / "scored.jsonl", options, ["--threads", "1"], between)
    assert children.read_text() == before


def test_pairs_are_the_same_for_a_seed_and_no_two_are_alike() -> None:
    found = list(rows(BulkBenchOptions(pairs=500)))
    assert found == list(rows(BulkBenchOptions(pairs=500)))
    assert len({row["instruction"] for row in found}) == 500


@pytest.mark.parametrize("words", ["bench run", "bench serve", "bench bulk", "render promptsource"])
def test_a_seed_below_0_is_wrong_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """NumPy refuses it, and Python takes -1 for 1."""
    assert main([*words.split(), "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err
