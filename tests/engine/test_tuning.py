"""`tune` measures for real, keeps its answer, and what it kept is what a scorer then takes."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.cli.main import main
from cappy_engine.tuning import Trial, choose_trial, made_up_pairs, tune


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_tuned_is_what_auto_takes(bundle: Path, cache: Path) -> None:
    found = tune(bundle, precision="int8", threads=2, seconds=0.1)
    assert found.path.parent == cache
    assert {trial.mode for trial in found.trials} == {"latency", "both"}
    assert all(trial.tokens_per_second > 0 for trial in found.trials)
    with Scorer.open(bundle, device="cpu", precision="int8", threads=2) as scorer:
        assert (scorer.info.mode, scorer.info.mode_reason) == (found.execution.mode, "measured by cappy tune")
        assert scorer.info.max_batch_tokens == found.execution.max_batch_tokens
    for options in ({"precision": "fp32", "threads": 2}, {"precision": "int8", "threads": 3}):
        with Scorer.open(bundle, device="cpu", **options) as other:  # type: ignore[arg-type]
            assert other.info.mode_reason.startswith("auto: ")


def test_with_one_thread_only_batch_sizes_are_measured(bundle: Path) -> None:
    found = tune(bundle, precision="fp32", threads=1, seconds=0.1)
    assert {trial.mode for trial in found.trials} == {"latency"}


def test_the_command_shows_what_was_measured_and_chosen(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(bundle), "--precision", "int8", "--threads", "2", "--seconds", "0.1"]) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["mode", "tokens", "a", "batch", "tokens/s"]
    assert sum(line.endswith("chosen") for line in lines) == 1
    assert last.startswith("kept in ")


def test_the_users_pairs_may_be_packed(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"instruction": "Is it?", "response": "Yes"}\n'))
    command = ["tune", str(bundle), "--precision", "int8", "--threads", "1", "--seconds", "0.1"]
    assert main([*command, "--pairs", str(packed)]) == 0
    assert "kept in" in capsys.readouterr().out


def test_a_file_without_pairs_is_an_error(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    assert main(["tune", str(bundle), "--pairs", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl holds no pairs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no pairs"):
        tune(bundle, pairs=[])


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({("latency", 512): 100, ("both", 512): 102}, ("latency", 512)),
        ({("latency", 512): 100, ("both", 512): 110}, ("both", 512)),
        ({("latency", 1024): 100, ("latency", 256): 99}, ("latency", 256)),
        ({("both", 1024): 200, ("both", 256): 150, ("latency", 256): 100}, ("both", 1024)),
    ],
)
def test_weights_are_held_twice_only_where_that_is_worth_it(
    rates: dict[tuple[str, int], float], best: tuple[str, int]
) -> None:
    found = choose_trial([Trial(mode, budget, rate) for (mode, budget), rate in rates.items()])
    assert (found.mode, found.max_batch_tokens) == best


def test_the_made_up_pairs_are_distinct_and_of_many_lengths() -> None:
    pairs = made_up_pairs()
    assert len(set(pairs)) == len(pairs)
    assert len({len(instruction.split()) for instruction, _ in pairs}) > 15
