"""`tune` measures for real, keeps its answer, and what it kept is what a scorer then takes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cli.main import main
from cappy_engine.cpu.execution import Execution
from cappy_engine.cpu.kernels import VARIABLE, find_kernels
from cappy_engine.cpu.tuned import tuned_key, tuning_facts, write_tuned
from cappy_engine.errors import BundleError, OutputError
from cappy_engine.scored import Scored
from cappy_engine.storage import cache_folder
from cappy_engine.tuning import Trial, choose_trial, forget, made_up_pairs, tune
from tests.support.columns import Series


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


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "budget"), [("latency", 256), ("latency", 1024), ("both", 512), ("both", 1024)])
def test_what_is_fastest_on_a_machine_is_found_in_the_time_that_was_given(
    bundle: Path, mode: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine scores 100 tokens a second, and 150 in one mode with one size of batches, by a clock of its own."""
    now, score_pairs = [0.0], Scorer.score_pairs

    def score(scorer: Scorer, pairs: Any, *, max_batch_tokens: int = 512) -> Scored:
        is_best = (scorer.info.mode, max_batch_tokens) == (mode, budget)
        found = score_pairs(scorer, pairs, max_batch_tokens=max_batch_tokens)
        now[0] += int(found.token_counts.sum()) / (150 if is_best else 100)
        return found

    monkeypatch.setattr(Scorer, "score_pairs", score)
    monkeypatch.setattr("cappy_engine.tuning.time", SimpleNamespace(perf_counter=lambda: now[0]))
    pairs = [("word " * (20 + number % 7), str(number)) for number in range(600)]
    found = tune(bundle, precision="int8", threads=2, pairs=pairs, seconds=300)
    assert (found.execution.mode, found.execution.max_batch_tokens) == (mode, budget)
    rates = {(trial.mode, trial.max_batch_tokens): trial.tokens_per_second for trial in found.trials}
    assert rates == pytest.approx(dict.fromkeys(rates, 100) | {(mode, budget): 150})
    assert len(rates) == 6
    assert {len(trial.rates) for trial in found.trials} <= {3, 4}
    assert 300 <= now[0] < 450  # with the warming up, and the round in which the time is over


def test_an_answer_is_not_taken_with_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_kernels().library is None:
        pytest.skip(f"needs the native library: {find_kernels().why_not}")
    facts = tuning_facts(open_bundle(EMBEDDED), "int8", 2)
    write_tuned(cache_folder(), tuned_key(facts), Execution("throughput", 77, "9 tokens/s"), facts)
    for asked, taken in (("auto", "throughput"), ("none", "both")):
        monkeypatch.setenv(VARIABLE, asked)
        with Scorer.open(device="cpu", threads=2) as scorer:
            assert scorer.info.mode == taken


def test_with_one_thread_only_batch_sizes_are_measured(bundle: Path) -> None:
    found = tune(bundle, precision="fp32", threads=1, seconds=0.1)
    assert {trial.mode for trial in found.trials} == {"latency"}


def test_the_command_shows_what_was_measured_and_chosen(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(bundle), "--precision", "int8", "--threads", "2", "--seconds", "0.1"]) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["mode", "tokens", "a", "batch", "tokens/s", "min..max"]
    assert sum(line.endswith("chosen") for line in lines) == 1
    assert last.startswith("kept in ")
    for line in lines:
        median, spread = line.split()[2:4]
        slowest, fastest = map(float, spread.split(".."))
        assert slowest <= float(median) <= fastest


def answers(cache: Path) -> int:
    return len(list(cache.glob("*.json")))


@pytest.mark.slow
def test_answers_are_forgotten_for_one_bundle_or_for_all(
    bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(bundle, precision="int8", threads=1, seconds=0.1)
    tune(bundle, precision="fp32", threads=1, seconds=0.1)
    tune(threads=1, seconds=0.1)
    (cache / "engines").mkdir()
    (cache / "of-something-else.json").write_text("{}")
    assert answers(cache) == 4
    assert main(["tune", "--clear", str(bundle)]) == 0
    assert capsys.readouterr().out == f"forgot 2 answers in {cache}\n"
    assert answers(cache) == 2
    assert main(["tune", "--clear"]) == 0
    assert capsys.readouterr().out == f"forgot 1 answer in {cache}\n"
    assert sorted(path.name for path in cache.iterdir()) == ["engines", "of-something-else.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"facts": {"model": 1}}', b"\xff"])
def test_an_answer_that_cannot_be_read_is_forgotten_with_those_of_any_bundle(cache: Path, content: bytes) -> None:
    cache.mkdir()
    for named in ((EMBEDDED,), ()):
        (cache / f"{'0' * 32}.json").write_bytes(content)
        assert forget(*named) == 1
        assert forget(*named) == 0


def test_an_answer_that_cannot_be_read_is_told_and_mended(
    bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options: Any = {"device": "cpu", "precision": "int8", "threads": 2}
    with Scorer.open(bundle, **options) as scorer:
        default = (scorer.info.mode_reason, scorer.info.max_batch_tokens)
    path = tune(bundle, precision="int8", threads=2, seconds=0.1).path
    path.write_text('{"mode": "both"')
    with Scorer.open(bundle, **options) as scorer:
        assert (scorer.info.mode_reason, scorer.info.max_batch_tokens) == default
    (message,) = (record.getMessage() for record in caplog.records)
    assert str(path) in message
    with Scorer.open(bundle, **options, mode="both", max_batch_tokens=100):
        assert len(caplog.records) == 1  # nothing is asked of the answer
    assert tune(bundle, precision="int8", threads=2, seconds=0.1).path == path
    with Scorer.open(bundle, **options) as scorer:
        assert scorer.info.mode_reason == "measured by cappy tune"
    assert len(caplog.records) == 1
    path.write_text("{}")
    assert main(["tune", str(bundle), "--clear"]) == 0
    assert capsys.readouterr().out == f"forgot 1 answer in {cache}\n"
    assert answers(cache) == 0


def test_a_trial_is_worth_its_median_round() -> None:
    assert Trial("latency", 512, (90.0, 100.0, 900.0)).tokens_per_second == 100


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
    found = choose_trial([Trial(mode, budget, (rate,)) for (mode, budget), rate in rates.items()])
    assert (found.mode, found.max_batch_tokens) == best


def test_the_made_up_pairs_are_distinct_and_of_many_lengths() -> None:
    pairs = made_up_pairs()
    assert len(set(pairs)) == len(pairs)
    assert len({len(instruction.split()) for instruction, _ in pairs}) > 15


def test_answers_are_forgotten_for_what_was_named_or_for_all_never_for_none(bundle: Path, cache: Path) -> None:
    (cache).mkdir()
    (cache / f"{'0' * 32}.json").write_text("{}")
    asked: list[Any] = [None, ""]
    for nothing in asked:
        for call in (forget, tune):
            with pytest.raises(BundleError, match="a bundle's folder is needed"):
                call(nothing)
    assert answers(cache) == 1
    assert forget() == 1


@pytest.mark.parametrize("seconds", ["20", True, 0, -1, float("nan"), float("inf")])
def test_seconds_are_a_number_above_zero(bundle: Path, seconds: Any) -> None:
    with pytest.raises(ValueError, match="seconds must be"):
        tune(bundle, seconds=seconds)


@pytest.mark.parametrize("make", [iter, Series, lambda pairs: np.array(pairs)])
def test_the_users_pairs_may_come_from_anything_that_holds_pairs(bundle: Path, make: Callable[[Any], Any]) -> None:
    pairs = [("Is it?", "Yes"), ("Is it?", "No")]
    assert tune(bundle, precision="int8", threads=1, pairs=make(pairs), seconds=0.001).trials
    with pytest.raises(ValueError, match="no pairs"):
        tune(bundle, pairs=make([]))


def test_a_cache_that_cannot_be_written_is_known_before_anything_is_measured(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for cache, problem in ((tmp_path / "file", "File exists"), (Path("/proc/nowhere"), "No such file or directory")):
        monkeypatch.setenv("CAPPY_CACHE", str(cache))
        said: list[str] = []
        with pytest.raises(OutputError, match=f"kept in {cache} .{problem}.; name another folder in CAPPY_CACHE"):
            tune(bundle, seconds=0.1, say=said.append)
        assert not said
        assert main(["tune", str(bundle), "--seconds", "0.1"]) == 1
        assert f"cappy tune: the answer cannot be kept in {cache}" in capsys.readouterr().err
