"""The suite exposes a slow runner and a wrong one: fakes with known times and scores in place of tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cappy_bench.peers.peer import Pair
from cappy_bench.speed.figures import Ratio, compare_with_peer, figures
from cappy_bench.speed.suite import measure_peak
from cappy_bench.speed.tables import missing_table, ratio_table, runner_table, workload_table
from cappy_bench.speed.verdicts import Reference, judge_runner
from cappy_bench.speed.workloads import Workload
from cappy_engine.errors import BenchmarkError
from tests.support.fake_tools import FakeTool, Measure, Run, row_of, runner_of, spec, true_score


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
    tool: FakeTool, reason: str, measure: Measure, tmp_path: Path
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


def test_one_wrong_score_in_one_round_is_enough(measure: Measure, workloads: list[Workload]) -> None:
    victim, seen = workloads[0].pairs[0], []

    def score(pair: Pair) -> float:
        seen.extend([pair] if pair == victim else [])
        return true_score(pair) + (0.5 if pair == victim and len(seen) == 2 else 0.0)

    assert runner_of(measure(FakeTool(spec("flaky"), score=score), run=Run(rounds=3)), "flaky")["status"] == "wrong"
    assert len(seen) == 3


def test_our_own_wrong_scores_are_shown_as_wrong_too(measure: Measure) -> None:
    result = measure(FakeTool(spec("cappy"), score=lambda pair: true_score(pair) + 0.1), FakeTool(spec("peer")))
    assert row_of(workload_table(result, "bulk"), "cappy")[2] == "wrong"
    assert compare_with_peer(result, runner_of(result, "peer"), "bulk") is None


@pytest.mark.parametrize("step", ["prepare", "open", "score", "versions"])
def test_a_runner_that_fails_stays_in_the_result_with_its_reason(step: str, measure: Measure) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("broken"), fails_at=step))
    assert row_of(missing_table(result), "broken")[-1] == f"no {step} today"
    assert runner_of(result, "cappy")["status"] == "ok"


def test_a_stopped_run_goes_on_where_it_was(measure: Measure, tmp_path: Path) -> None:
    notes = tmp_path / "kept.jsonl"

    def stop(pair: Pair) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(FakeTool(spec("cappy")), FakeTool(spec("peer"), score=stop), run=Run(notes=notes))
    done = [json.loads(line)["key"] for line in notes.read_text().splitlines()]
    assert ["cell", "0", "interactive", "cappy"] in done
    assert ["cell", "0", "interactive", "peer"] not in done
    peer, ours = FakeTool(spec("peer")), FakeTool(spec("cappy"))
    whole = measure(ours, peer, run=Run(notes=notes))
    again = measure(
        FakeTool(spec("cappy"), fails_at="prepare"), FakeTool(spec("peer"), fails_at="open"), run=Run(notes=notes)
    )
    assert again["runners"] == whole["runners"], "nothing was measured a second time"


@pytest.mark.parametrize("step", ["versions", "prepare", "score"])
def test_what_failed_is_tried_again_by_a_resumed_run(step: str, measure: Measure, tmp_path: Path) -> None:
    notes = tmp_path / "kept.jsonl"
    first = measure(FakeTool(spec("cappy")), FakeTool(spec("peer"), fails_at=step), run=Run(notes=notes))
    again = measure(FakeTool(spec("cappy")), FakeTool(spec("peer")), run=Run(notes=notes))
    assert runner_of(first, "peer")["status"] in ("skipped", "failed")
    assert runner_of(again, "peer")["status"] == "ok"
    assert runner_of(again, "cappy")["cells"] == runner_of(first, "cappy")["cells"]


def test_a_resumed_run_of_fewer_rounds_takes_so_many(measure: Measure, tmp_path: Path) -> None:
    notes = tmp_path / "kept.jsonl"
    measure(FakeTool(spec("cappy")), run=Run(notes=notes, rounds=3))
    again = measure(FakeTool(spec("cappy"), fails_at="score"), run=Run(notes=notes, rounds=2))
    assert {len(cell["seconds"]) for cell in runner_of(again, "cappy")["cells"]} == {2}
    assert len(again["peak"]["fp32"]["rounds"]) == 2


def test_other_token_ids_are_looked_at_again_by_a_resumed_run(measure: Measure, tmp_path: Path) -> None:
    notes = tmp_path / "kept.jsonl"
    measure(FakeTool(spec("peer"), token_ids=lambda pair: [1]), run=Run(notes=notes))
    assert runner_of(measure(FakeTool(spec("peer")), run=Run(notes=notes)), "peer")["status"] == "ok"


def test_a_runner_that_takes_too_long_for_a_workload_does_it_once(measure: Measure) -> None:
    result = measure(
        FakeTool(spec("cappy")), FakeTool(spec("slow"), slowness=1e6), run=Run(max_seconds=1000.0, rounds=3)
    )
    slow, quick = runner_of(result, "slow"), runner_of(result, "cappy")
    assert {len(cell["seconds"]) for cell in slow["cells"]} == {1}
    assert {len(cell["seconds"]) for cell in quick["cells"]} == {3}
    assert isinstance(compare_with_peer(result, slow, "bulk"), Ratio)


def test_the_order_of_runners_is_reversed_from_round_to_round_of_a_workload(
    measure: Measure, workloads: list[Workload]
) -> None:
    order: list[tuple[str, Pair]] = []

    def remember(name: str) -> Callable[[Pair], float]:
        return lambda pair: order.append((name, pair)) or true_score(pair)  # type: ignore[func-returns-value]

    measure(*(FakeTool(spec(name), score=remember(name)) for name in ("cappy", "one", "two")), run=Run(rounds=3))
    for workload in workloads:
        last = workload.pairs[-1]
        turns = [name for name, pair in order if pair == last][-9:]
        assert turns[:3] == turns[3:6][::-1] == turns[6:]


def test_notes_that_end_within_a_line_are_taken_up_to_it(measure: Measure, tmp_path: Path) -> None:
    notes = tmp_path / "kept.jsonl"
    measure(FakeTool(spec("cappy")), run=Run(notes=notes))
    text = notes.read_text(encoding="utf-8")
    notes.write_text(text[:-20], encoding="utf-8")
    assert runner_of(measure(FakeTool(spec("cappy")), run=Run(notes=notes)), "cappy")["status"] == "ok"


EXPORTED = {"int8": {"max_error": 0.069, "mean_error": 0.01, "spearman": 0.997, "winner_agreement": 0.9, "pairs": 279}}


def test_without_a_checkpoint_the_parity_is_the_exports_and_no_reference_is_started(measure: Measure) -> None:
    alone = Run(has_checkpoint=False, exported={"fp32": {**EXPORTED["int8"], "max_error": 1e-6}, **EXPORTED})
    reference = FakeTool(spec("reference"), fails_at="open")
    result = measure(reference, FakeTool(spec("cappy-int8", "int8")), run=alone)
    ours = runner_of(result, "cappy-int8")
    assert (ours["status"], ours["parity"]) == ("ok", EXPORTED["int8"])
    assert result["reference"] is None
    assert row_of(workload_table(result, "bulk"), "cappy-int8")[-3:] == ["0.069", "0.9970", ""]


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (FakeTool(spec("cappy"), score=lambda pair: float("inf")), "scores are not numbers"),
        (FakeTool(spec("cappy"), drops_last=True), "scores for"),
    ],
    ids=["not a number", "one missing"],
)
def test_without_a_checkpoint_what_is_no_score_is_wrong_all_the_same(
    tool: FakeTool, reason: str, measure: Measure
) -> None:
    found = runner_of(measure(tool, run=Run(has_checkpoint=False)), "cappy")
    assert found["status"] == "wrong"
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("precision", "reason"), [("fp32", "max error nan, limit "), ("int8", "Spearman nan, limit 0.97")]
)
def test_a_parity_that_is_not_a_number_keeps_no_limit(precision: str, reason: str, workloads: list[Workload]) -> None:
    """The runner's scores are numbers; one of the reference's is not."""
    scores = {one.name: [true_score(pair) for pair in one.pairs] for one in workloads}
    cells = {
        one.name: [{"status": "ok", "scores": [[true_score(pair) for pair in request] for request in one.requests]}]
        for one in workloads
    }
    judged = judge_runner(spec("cappy", precision), workloads, cells, Reference(scores, []), {})
    assert judged.status == "ok"
    scores["bulk"][3] = float("nan")
    judged = judge_runner(spec("cappy", precision), workloads, cells, Reference(scores, []), {})
    assert judged.status == "wrong"
    assert reason in (judged.reason or "")


@pytest.mark.parametrize(
    ("precision", "off", "told"),
    [
        ("bf16", {"spearman": 0.99496}, "Spearman 0.99496, limit 0.995"),
        ("int8", {"spearman": 0.96999999}, "Spearman 0.96999999, limit 0.97"),
        ("int8", {"spearman": 0.948}, "Spearman 0.948, limit 0.97"),
        ("fp32", {"max_error": 1.0001e-4}, "max error 0.00010001, limit 0.0001"),
    ],
)
def test_a_reason_has_the_digits_that_part_a_value_from_its_limit(
    precision: str, off: dict[str, float], told: str, workloads: list[Workload], monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = {"max_error": 0.5, "mean_error": 0.1, "spearman": 0.5, "winner_agreement": 0.5, "worst": []}
    monkeypatch.setattr("cappy_bench.speed.verdicts.measure", lambda *scores: {**parity, **off})
    scores = {one.name: [true_score(pair) for pair in one.pairs] for one in workloads}
    cells = {
        one.name: [{"status": "ok", "scores": [[true_score(pair) for pair in request] for request in one.requests]}]
        for one in workloads
    }
    assert judge_runner(spec("cappy", precision), workloads, cells, Reference(scores, []), {}).reason == told


def test_a_reason_of_an_earlier_result_is_shown_with_these_digits(measure: Measure) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("bad", "bf16"), score=lambda pair: -true_score(pair)))
    runner_of(result, "bad")["reason"] = "Spearman 0.995, limit 0.995"
    runner_of(result, "bad")["parity"]["spearman"] = 0.99496
    for table in (workload_table(result, "bulk"), runner_table(result)):
        assert "Spearman 0.99496, limit 0.995" in row_of(table, "bad")[-1]


def test_a_reference_that_cannot_run_ends_the_run_with_its_reason(measure: Measure) -> None:
    with pytest.raises(BenchmarkError, match="cannot be scored with PyTorch: no open today"):
        measure(FakeTool(spec("reference"), fails_at="open"), FakeTool(spec("cappy")))


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_reference_without_scores_ends_the_run_before_anything_is_compared(score: float, measure: Measure) -> None:
    with pytest.raises(BenchmarkError, match=f"PyTorch itself gives {score} for .* pairs"):
        measure(FakeTool(spec("reference"), score=lambda pair: score), FakeTool(spec("cappy")))


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"value": 1}', b'{"key": ["\xff"], "value": {}}'])
def test_notes_with_a_damaged_line_are_not_gone_on_with(damaged: bytes, measure: Measure, tmp_path: Path) -> None:
    notes, ours = tmp_path / "kept.jsonl", FakeTool(spec("cappy"))
    measure(FakeTool(spec("cappy")), run=Run(notes=notes))
    first, _, *others = notes.read_bytes().splitlines()
    content = b"".join(line + b"\n" for line in (first, damaged, *others))
    notes.write_bytes(content)
    with pytest.raises(BenchmarkError, match=r"kept\.jsonl, line 2 is not a note .*; remove this file"):
        measure(ours, run=Run(notes=notes))
    assert ours.calls == []
    assert notes.read_bytes() == content


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_notes_with_a_reference_that_is_not_finite_are_not_gone_on_with(
    score: float, measure: Measure, tmp_path: Path
) -> None:
    notes, ours = tmp_path / "kept.jsonl", FakeTool(spec("cappy"))
    measure(FakeTool(spec("cappy")), run=Run(notes=notes))
    first, *others = notes.read_text(encoding="utf-8").splitlines()
    entry = json.loads(first)
    assert entry["key"] == ["reference"]
    entry["value"]["scores"]["bulk"][3] = score
    notes.write_text("".join(f"{line}\n" for line in (json.dumps(entry), *others)), encoding="utf-8")
    with pytest.raises(BenchmarkError, match=rf"kept\.jsonl has .* a score of {score} for 1 pairs.*; remove this file"):
        measure(ours, run=Run(notes=notes))
    assert ours.calls == []


def test_a_peak_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no onnx here' >&2; exit 1\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BenchmarkError, match="the machine's peak cannot be measured: ModuleNotFoundError: no onnx"):
        measure_peak(1)
