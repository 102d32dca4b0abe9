"""The benchmark suite exposes a slow runner and a wrong one: fakes with known times and scores in place of tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cappy_bench.peers
from cappy_bench.machine import describe_machine
from cappy_bench.peers.peer import Model, Pair
from cappy_bench.peers.process import ENVIRONMENTS, RunnerFailed, WorkerProcess, in_short, link_packages, start_worker
from cappy_bench.peers.specs import SPECS, Spec
from cappy_bench.speed.figures import SCHEMA, Ratio, compare_with_peer, figures, is_as_right, useful_flops
from cappy_bench.speed.report import write_report
from cappy_bench.speed.suite import Plan, run_suite
from cappy_bench.speed.tables import missing_table, ratio_table, runner_table, workload_table
from cappy_bench.speed.workloads import DESCRIPTIONS, LENGTHS, Sizes, Workload, make_pool, make_workloads
from cappy_engine import Scorer
from cappy_engine.bundle import EMBEDDED
from cappy_engine.cli.main import main
from cappy_engine.errors import BenchmarkError
from cappy_engine.tokenizer import PairTokenizer

SIZES = Sizes(interactive=6, lengths=2, rerank=2, bulk=24, long=3, padded=2)
SECONDS_PER_CHARACTER = 1e-3


def true_score(pair: Pair) -> float:
    """What the fakes' reference says: any number that differs between pairs."""
    return float(np.sin(sum(map(ord, pair[0] + pair[1]))))


@dataclass
class FakeTool:
    """A tool in place of a process: scores and times by rule. `calls` is how often it was asked for scores."""

    spec: Spec
    slowness: float = 1.0
    score: Callable[[Pair], float] = true_score
    token_ids: Callable[[Pair], list[int]] = lambda pair: [len(text) for text in pair]
    fails_at: str | None = None
    drops_last: bool = False
    calls: list[int] = field(default_factory=list)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer as `cappy_bench.peers.worker` does."""
        if message["do"] == self.fails_at:
            raise RunnerFailed(f"no {self.fails_at} today")
        if message["do"] == "versions":
            return {"versions": dict.fromkeys(message["packages"], "1.0")}
        if message["do"] == "token_ids":
            return {"token_ids": [self.token_ids((first, second)) for first, second in message["pairs"]]}
        if message["do"] != "score":
            return {"seconds": 0.0}
        requests = [[(first, second) for first, second in request] for request in message["requests"]]
        self.calls.append(len(requests))
        characters = [sum(len(first) + len(second) for first, second in request) for request in requests]
        scores = [[self.score(pair) for pair in request] for request in requests]
        if self.drops_last:
            scores[-1] = scores[-1][:-1]
        return {
            "seconds": [SECONDS_PER_CHARACTER * count * self.slowness for count in characters],
            "scores": scores,
            "computed_tokens": None,
            "peak_bytes": 1_000_000,
        }

    def close(self) -> None:
        """Nothing to end."""


def spec(name: str, precision: str = "fp32") -> Spec:
    module = "cappy" if name.startswith("cappy") else "fake"
    return Spec(name, module, precision, "a fake", ("fake",))


@pytest.fixture(scope="module")
def tokenizer() -> PairTokenizer:
    return PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=512)


@pytest.fixture(scope="module")
def workloads(tokenizer: PairTokenizer) -> list[Workload]:
    words = ["sky", "blue", "is", "the", "question", "answer", "why"]
    return make_workloads(make_pool(words, seed=0, count=600), tokenizer, SIZES, seed=0)


@pytest.fixture
def measure(workloads: list[Workload], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the suite on fakes; returns a whole result."""

    def run(*tools: FakeTool, notes: Path | None = None, **options: Any) -> dict[str, Any]:
        by_name = {tool.spec.name: tool for tool in (FakeTool(spec("reference")), *tools)}
        plan = Plan(
            specs=[tool.spec for tool in tools],
            workloads=workloads,
            model=Model(tmp_path, tmp_path / "work", 1, None if options.get("is_alone") else tmp_path),
            rounds=options.get("rounds", 2),
            max_seconds=options.get("max_seconds", 1e9),
            reserve_bytes=0,
            exported=options.get("exported", {}),
        )
        measured = run_suite(
            plan,
            notes=notes or tmp_path / f"notes-{uuid.uuid4().hex}.jsonl",
            peak=lambda threads: {"fp32": {"flops": 1e12, "how": "fake"}, "int8": {"flops": 2e12, "how": "fake"}},
            start=lambda asked, model: by_name[asked.name],
        )
        shape = {"hidden_size": 8, "intermediate_size": 32, "layers": 2}
        for entry, workload in zip(measured["workloads"], workloads, strict=True):
            entry["flops"] = useful_flops(shape, workload.worked_lengths.tolist())
        return {
            "schema": SCHEMA,
            "title": "fakes",
            "started": "2026-01-01T00:00:00+00:00",
            "seconds": 1.0,
            "is_resumed": False,
            "commit": "none",
            "machine": describe_machine(),
            "settings": {"threads": 1, "seed": 0, "rounds": 2, "max_seconds": 60.0, "pairs": "words"},
            "model": {"name": "fake", "weights_sha256": "0" * 64, "parameters": 1000, "shape": shape},
            **measured,
        }

    return run


def runner_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(runner for runner in result["runners"] if runner["name"] == name)
    return found


def row_of(table: str, name: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.strip("| *").startswith(f"{name} ") or f"*{name}*" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_slowed_runner_is_exposed_with_its_ratio(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("slow"), slowness=3.0))
    for name in DESCRIPTIONS:
        ratio = compare_with_peer(result, runner_of(result, "slow"), name)
        assert isinstance(ratio, Ratio)
        assert ratio.median == pytest.approx(3.0)
        assert row_of(workload_table(result, name), "slow")[-1].startswith("3.00x")


def test_where_a_peer_is_faster_the_table_says_that_it_wins(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure(FakeTool(spec("cappy"), slowness=2.0), FakeTool(spec("fast")))
    assert row_of(workload_table(result, "bulk"), "fast")[-1] == "**0.50x (0.50 to 0.50): the peer wins** over cappy"
    assert row_of(ratio_table(result), "fast")[2:] == ["**0.50 peer wins**"] * len(DESCRIPTIONS)


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (FakeTool(spec("bad"), score=lambda pair: true_score(pair) + 2e-4), "max error 0.0002, limit 0.0001"),
        (FakeTool(spec("bad"), score=lambda pair: 1 / (1 + np.exp(-true_score(pair)))), "max error"),
        (FakeTool(spec("bad", "int8"), score=lambda pair: -true_score(pair)), "Spearman -1.000, limit 0.97"),
        (FakeTool(spec("bad"), score=lambda pair: float("nan")), "scores are not numbers"),
        (FakeTool(spec("bad"), drops_last=True), "scores for"),
        (FakeTool(spec("bad"), token_ids=lambda pair: [1]), "other token ids than the reference's"),
    ],
    ids=["a little off", "a sigmoid", "upside down", "not a number", "one missing", "other tokens"],
)
def test_a_wrong_runner_reads_wrong_everywhere_and_has_no_speed(
    tool: FakeTool, reason: str, measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tool.slowness = 0.01  # far faster than ours, and it must not help
    result = measure(FakeTool(spec("cappy")), tool)
    found = runner_of(result, "bad")
    assert found["status"] == "wrong"
    assert reason in found["reason"]
    for workload in result["workloads"]:
        assert figures(result, found, workload) is None
        assert compare_with_peer(result, found, workload["name"]) is None
        row = row_of(workload_table(result, workload["name"]), "bad")
        assert row[2:-1] == ["wrong"] * (len(row) - 3)
        assert reason in row[-1]
    assert set(row_of(ratio_table(result), "bad")[2:]) == {"wrong"}
    assert "**wrong**" in row_of(runner_table(result), "bad")[-1]


def test_one_wrong_score_in_one_round_is_enough(
    measure: Callable[..., dict[str, Any]], workloads: list[Workload]
) -> None:
    victim, seen = workloads[0].pairs[0], []

    def score(pair: Pair) -> float:
        seen.extend([pair] if pair == victim else [])
        return true_score(pair) + (0.5 if pair == victim and len(seen) == 2 else 0.0)

    assert runner_of(measure(FakeTool(spec("flaky"), score=score), rounds=3), "flaky")["status"] == "wrong"
    assert len(seen) == 3


def test_our_own_wrong_scores_are_shown_as_wrong_too(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure(FakeTool(spec("cappy"), score=lambda pair: true_score(pair) + 0.1), FakeTool(spec("peer")))
    assert row_of(workload_table(result, "bulk"), "cappy")[2] == "wrong"
    assert compare_with_peer(result, runner_of(result, "peer"), "bulk") is None


@pytest.mark.parametrize("step", ["prepare", "open", "score", "versions"])
def test_a_runner_that_fails_stays_in_the_result_with_its_reason(
    step: str, measure: Callable[..., dict[str, Any]]
) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("broken"), fails_at=step))
    assert row_of(missing_table(result), "broken")[-1] == f"no {step} today"
    assert runner_of(result, "cappy")["status"] == "ok"


def test_ours_is_compared_in_the_fastest_precision_that_is_as_right(measure: Callable[..., dict[str, Any]]) -> None:
    ours8 = FakeTool(spec("cappy-int8", "int8"), slowness=0.5, score=lambda pair: round(true_score(pair), 1))
    peers = [
        FakeTool(spec("exact")),
        FakeTool(spec("closer", "int8"), score=lambda pair: round(true_score(pair), 2)),
        FakeTool(spec("farther", "int8"), score=lambda pair: round(true_score(pair) * 4) / 4),
    ]
    result = measure(FakeTool(spec("cappy")), ours8, *peers)
    for name, ours, times in (("exact", "cappy", 1.0), ("closer", "cappy", 1.0), ("farther", "cappy-int8", 2.0)):
        ratio = compare_with_peer(result, runner_of(result, name), "bulk")
        assert isinstance(ratio, Ratio)
        assert ratio.ours == ours
        assert ratio.median == pytest.approx(times)


def test_without_scores_as_right_as_the_peers_there_is_no_ratio(measure: Callable[..., dict[str, Any]]) -> None:
    ours8 = FakeTool(spec("cappy-int8", "int8"), score=lambda pair: round(true_score(pair), 1))
    result = measure(ours8, FakeTool(spec("exact")))
    assert compare_with_peer(result, runner_of(result, "exact"), "bulk") == "none of ours is as right"
    assert row_of(workload_table(result, "bulk"), "exact")[-1] == "none of ours is as right"


def test_a_stopped_run_goes_on_where_it_was(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    notes = tmp_path / "kept.jsonl"

    def stop(pair: Pair) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(FakeTool(spec("cappy")), FakeTool(spec("peer"), score=stop), notes=notes)
    done = [json.loads(line)["key"] for line in notes.read_text().splitlines()]
    assert ["cell", "0", "interactive", "cappy"] in done
    assert ["cell", "0", "interactive", "peer"] not in done
    peer, ours = FakeTool(spec("peer")), FakeTool(spec("cappy"))
    whole = measure(ours, peer, notes=notes)
    again = measure(FakeTool(spec("cappy"), fails_at="prepare"), FakeTool(spec("peer"), fails_at="open"), notes=notes)
    assert again["runners"] == whole["runners"], "nothing was measured a second time"


@pytest.mark.parametrize("step", ["versions", "prepare", "score"])
def test_what_failed_is_tried_again_by_a_resumed_run(
    step: str, measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    notes = tmp_path / "kept.jsonl"
    first = measure(FakeTool(spec("cappy")), FakeTool(spec("peer"), fails_at=step), notes=notes)
    again = measure(FakeTool(spec("cappy")), FakeTool(spec("peer")), notes=notes)
    assert runner_of(first, "peer")["status"] in ("skipped", "failed")
    assert runner_of(again, "peer")["status"] == "ok"
    assert runner_of(again, "cappy")["cells"] == runner_of(first, "cappy")["cells"]


def test_a_runner_that_takes_too_long_for_a_workload_does_it_once(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("slow"), slowness=1e6), max_seconds=1000.0, rounds=3)
    slow, quick = runner_of(result, "slow"), runner_of(result, "cappy")
    assert {len(cell["seconds"]) for cell in slow["cells"]} == {1}
    assert {len(cell["seconds"]) for cell in quick["cells"]} == {3}
    assert isinstance(compare_with_peer(result, slow, "bulk"), Ratio)


def test_a_tool_that_cannot_pad_is_left_out_of_that_workload_only(measure: Callable[..., dict[str, Any]]) -> None:
    peer = Spec("peer", "fake", "fp32", "a fake", ("fake",), can_pad=False)
    result = measure(FakeTool(spec("cappy")), FakeTool(peer))
    assert row_of(workload_table(result, "padded"), "peer")[-1] == "cannot be made to pad to one length"
    assert runner_of(result, "peer")["status"] == "ok"


def test_the_report_shows_every_table_and_plot(measure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = measure(
        FakeTool(spec("cappy")), FakeTool(spec("slow"), slowness=2.0), FakeTool(spec("gone"), fails_at="open")
    )
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "fakes.json").write_text(json.dumps(result), encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    for workload in DESCRIPTIONS:
        assert workload_table(result, workload) in text
    assert ratio_table(result) in text
    assert "no open today" in text
    plots = sorted(path.name for path in folder.glob("*.svg"))
    assert plots == ["fakes-error.svg", "fakes-latency.svg", "fakes-throughput.svg"]
    assert all(f"({name})" in text for name in plots)
    assert "slow" in (folder / "fakes-throughput.svg").read_text(encoding="utf-8")


def test_a_report_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cappy bench run"):
        write_report(tmp_path)


def test_compare_prints_one_result_or_what_changed(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, slowness in (("before", 2.0), ("after", 1.0)):
        result = measure(FakeTool(spec("cappy"), slowness=slowness), FakeTool(spec("peer")))
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    main(["bench", "compare", str(tmp_path / "before.json")])
    assert "the peer wins" in capsys.readouterr().out
    main(["bench", "compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    changed = capsys.readouterr().out
    assert row_of(changed, "cappy")[2:] == ["2.00x"] * len(DESCRIPTIONS)
    assert row_of(changed, "peer")[2:] == ["1.00x"] * len(DESCRIPTIONS)


@given(
    errors=st.lists(st.floats(0, 1), min_size=2, max_size=2), ranks=st.lists(st.floats(-1, 1), min_size=2, max_size=2)
)
def test_of_two_that_are_equally_right_each_is_as_right_as_the_other(errors: list[float], ranks: list[float]) -> None:
    first, second = (
        {"max_error": error * 2, "mean_error": error, "spearman": rank}
        for error, rank in zip(errors, ranks, strict=True)
    )
    assert is_as_right(first, first)
    if is_as_right(first, second) and is_as_right(second, first):
        both_exact = first["max_error"] <= 1e-4 and second["max_error"] <= 1e-4
        assert both_exact or first == second


def test_operations_are_those_that_pytorch_counts(checkpoint: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint

    model = load_model(open_checkpoint(checkpoint))
    config = model.config
    shape = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layers": config.num_hidden_layers,
    }
    head = 2 * (config.hidden_size**2 + config.hidden_size)
    for length in (3, 64, 500):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.int64))
        assert useful_flops(shape, [length]) + head == counter.get_total_flops()


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


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; sys.exit('no such model')", "ended with status 1: no such model"),
        ("""input(); print('{"error": "ValueError: too   large"}')""", "ValueError: too large"),
    ],
    ids=["dies", "answers with an error"],
)
def test_a_process_that_fails_says_why(script: str, reason: str, tmp_path: Path) -> None:
    worker = WorkerProcess([sys.executable, "-c", script], environment={}, log=tmp_path / "log")
    with pytest.raises(RunnerFailed, match=reason):
        worker.ask({"do": "open"})
    worker.close()


def test_the_order_of_runners_is_reversed_from_round_to_round_of_a_workload(
    measure: Callable[..., dict[str, Any]], workloads: list[Workload]
) -> None:
    order: list[tuple[str, Pair]] = []

    def remember(name: str) -> Callable[[Pair], float]:
        return lambda pair: order.append((name, pair)) or true_score(pair)  # type: ignore[func-returns-value]

    measure(*(FakeTool(spec(name), score=remember(name)) for name in ("cappy", "one", "two")), rounds=3)
    for workload in workloads:
        last = workload.pairs[-1]
        turns = [name for name, pair in order if pair == last][-9:]
        assert turns[:3] == turns[3:6][::-1] == turns[6:]


def test_notes_that_end_within_a_line_are_taken_up_to_it(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    notes = tmp_path / "kept.jsonl"
    measure(FakeTool(spec("cappy")), notes=notes)
    text = notes.read_text(encoding="utf-8")
    notes.write_text(text[:-20], encoding="utf-8")
    assert runner_of(measure(FakeTool(spec("cappy")), notes=notes), "cappy")["status"] == "ok"


def test_a_report_without_a_runner_that_ran_has_no_plots(
    measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    result = measure(FakeTool(spec("cappy"), fails_at="open"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "none.json").write_text(json.dumps(result), encoding="utf-8")
    page = write_report(tmp_path / "results")
    assert "no open today" in page.read_text(encoding="utf-8")
    assert not list(page.parent.glob("*.svg"))


def test_what_a_tool_prints_does_not_come_between_the_answers(tmp_path: Path) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import os\n"
        "from cappy_bench.peers.worker import serve\n"
        "def prepare(model, precision):\n"
        "    print('hello'); os.system('echo from a child')\n"
        "def open_runner(model, precision):\n"
        "    raise RuntimeError('out of luck')\n"
        "serve(open_runner, prepare)\n"
    )
    command = [sys.executable, str(noisy), "fp32", Model(Path("b"), Path("c"), 1).to_json()]
    worker = WorkerProcess(command, environment={}, log=tmp_path / "log")
    assert worker.ask({"do": "prepare"})["seconds"] >= 0
    with pytest.raises(RunnerFailed, match="RuntimeError: out of luck"):
        worker.ask({"do": "open"})
    with pytest.raises(RunnerFailed, match="the runner is not open"):
        worker.ask({"do": "score", "requests": [], "pad_to": None})
    worker.close()
    assert {"hello", "from a child"} <= set((tmp_path / "log").read_text().splitlines())


def test_reasons_hold_no_paths_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_short(f"no fp16\n  in {Path.cwd()}/bench/large") == "no fp16 in bench/large"


@pytest.mark.parametrize("environment", ["openvino", "infinity", "node"])
def test_a_runner_whose_environment_is_missing_says_where_it_is_told_how_to_make_it(
    environment: str, tmp_path: Path
) -> None:
    missing = next(one for one in SPECS if one.environment == environment)
    with pytest.raises(RunnerFailed, match=rf"there is no .*\.venv-bench-{environment}; how to make it: ") as caught:
        start_worker(missing, Model(tmp_path, tmp_path, threads=1), tools=tmp_path)
    recipe = Path.cwd() / str(caught.value).rpartition(": ")[2]
    assert f".venv-bench-{environment}" in recipe.read_text(encoding="utf-8")


def test_a_runner_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    missing = Spec("one", "torch_eager", "fp32", "a fake", ("no-such-package", "numpy"))
    with pytest.raises(RunnerFailed, match=r"not installed here: no-such-package; .*\.\[bench\]"):
        start_worker(missing, Model(tmp_path, tmp_path, threads=1), tools=tmp_path)


def test_another_environment_is_given_our_packages_and_no_others(tmp_path: Path) -> None:
    """Its own numpy must be used, not ours; and it needs no more of ours than numpy and tokenizers."""
    folder = link_packages(tmp_path / "packages")
    assert link_packages(folder) == folder, "a second run finds the links of the first"
    code = """
import sys
from importlib.machinery import PathFinder
allowed = {*sys.stdlib_module_names, "numpy", "tokenizers", "cappy_bench", "cappy_engine", "cappy_export"}
class Refuse(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse)
import cappy_bench.peers.batches, cappy_bench.peers.worker, cappy_export.proof.pairs
print(cappy_bench.__file__, len(cappy_export.proof.pairs.default_pairs()))
"""
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(folder / "cappy_bench" / "__init__.py"), "279"], done.stderr
    assert {path.name for path in folder.iterdir()} == {"cappy_bench", "cappy_engine", "cappy_export"}


def test_what_lies_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    ours = next(one for one in SPECS if one.is_ours and one.precision == "int8")
    worker = start_worker(ours, Model(EMBEDDED, tmp_path, threads=1), tools=tmp_path)
    try:
        worker.ask({"do": "open"})
        answer = worker.ask({"do": "score", "requests": [[("Is the sky blue?", "Yes")]], "pad_to": None})
    finally:
        worker.close()
    with Scorer.open(threads=1) as scorer:
        assert answer["scores"] == [scorer.score([("Is the sky blue?", "Yes")]).tolist()]


def test_every_runner_has_a_program_and_a_name_of_its_own() -> None:
    folder = Path(cappy_bench.peers.__path__[0])
    assert len({one.name for one in SPECS}) == len(SPECS)
    for one in SPECS:
        path = folder / (one.module if "." in one.module else f"{one.module}.py")
        assert path.suffix == ".mjs" or path.read_text(encoding="utf-8").count("\n    serve(open_runner") == 1
        assert one.environment in ("main", "node") or (ENVIRONMENTS / f"{one.environment}.txt").exists()


@pytest.mark.slow
def test_the_tools_of_this_environment_give_the_references_scores(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [one.name for one in SPECS if one.environment == "main" and one.name != "torch-compile"]
    out = tmp_path / "result.json"
    main(
        [
            "bench",
            "run",
            "--suite",
            "smoke",
            "--checkpoint",
            str(checkpoint),
            "--bundle",
            str(bundle),
            "--out",
            str(out),
        ]
        + ["--work", str(tmp_path / "work"), "--threads", "1", "--rounds", "1"]
        + [argument for name in names for argument in ("--runner", name)]
    )
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    # int8 of a tiny model of random weights may lose its order; what is exact must be exact
    assert {one["name"]: one["status"] for one in printed["runners"] if one["precision"] != "int8"} == {
        name: "ok" for name in names if not name.endswith("int8")
    }
    for one in printed["runners"]:
        assert one["status"] in ("ok", "wrong"), one["reason"]
        ran = [cell["status"] == "ok" for cell in one["cells"]]
        assert one["parity"]["pairs"] == sum(
            workload["pairs"] for workload, is_ok in zip(printed["workloads"], ran, strict=True) if is_ok
        )
