"""Tables and the report say who is faster, who is wrong and who did not run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from cappy_bench.machine import cpu_kind
from cappy_bench.speed.report import write_report
from cappy_bench.speed.tables import NOT_COMPARED, change_tables, ratio_table, result_tables, workload_table
from cappy_bench.speed.workloads import DESCRIPTIONS, Workload, make_workloads
from cappy_engine.errors import BenchmarkError
from cappy_engine.tokenizer import PairTokenizer
from tests.support.fake_tools import SIZES, FakeTool, Measure, Run, row_of, run_on_fakes, spec
from tests.support.places import ROOT


def test_where_a_peer_is_faster_the_table_says_that_it_wins(measure: Measure) -> None:
    result = measure(FakeTool(spec("cappy"), slowness=2.0), FakeTool(spec("fast")))
    assert row_of(workload_table(result, "bulk"), "fast")[-1] == "**0.50x (0.50 to 0.50): the peer wins** over cappy"
    assert row_of(ratio_table(result), "fast")[2:] == ["**0.50 peer wins**"] * len(DESCRIPTIONS)


def test_the_tables_say_how_much_each_workload_has(measure: Measure, workloads: list[Workload]) -> None:
    text = result_tables(measure(FakeTool(spec("cappy"))))
    for one in workloads:
        assert f"({len(one.pairs)} pairs, {one.token_counts.sum()} tokens)\n\n| runner" in text


@pytest.mark.slow
def test_the_report_shows_every_table_and_plot(measure: Measure, tmp_path: Path) -> None:
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
    cpu = cpu_kind(result["machine"])
    tables = [line for line in text.splitlines() if line.startswith("#") and line != "# Benchmarks"]
    assert [line for line in tables if not line.endswith(f"on {cpu}")] == ["### Did not run"]
    assert "slow" in (folder / "fakes-throughput.svg").read_text(encoding="utf-8")


def test_a_report_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cappy bench run"):
        write_report(tmp_path)
    (tmp_path / "gpu-check.json").write_text('{"steps": []}')
    with pytest.raises(BenchmarkError, match="cappy bench run"):
        write_report(tmp_path)


@pytest.mark.slow
def test_a_result_is_shown_whatever_the_model_is_called(measure: Measure, tmp_path: Path) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("slow"), slowness=2.0))
    (tmp_path / "gpu-like.json").write_text(json.dumps(result))
    (tmp_path / "serve-mini.json").write_text('{"schema": "cappy-load-1", "servers": []}')
    assert result["title"] in write_report(tmp_path).read_text(encoding="utf-8")


def test_what_changed_is_the_ratio_of_speeds_and_the_conditions(measure: Measure) -> None:
    before, after = (
        measure(FakeTool(spec("cappy"), slowness=slowness), FakeTool(spec("peer"))) for slowness in (2.0, 1.0)
    )
    changed = change_tables(before, after, names=("before.json", "after.json"))
    assert row_of(changed, "cappy")[2:] == ["2.00x"] * len(DESCRIPTIONS)
    assert row_of(changed, "peer")[2:] == ["1.00x"] * len(DESCRIPTIONS)
    assert "differ" not in changed
    elsewhere = {**after, "model": {**after["model"], "name": "the same weights in another folder"}}
    assert "differ" not in change_tables(before, elsewhere, names=("a", "b"))
    other = {**after, "model": {**after["model"], "weights_sha256": "1" * 64}, "machine": {}}
    changed = change_tables(before, other, names=("a", "b"))
    assert "differ in their machine" in changed
    assert "differ in their model" in changed
    assert "settings" not in changed
    earlier = {name: value for name, value in before["machine"].items() if not name.startswith("cpu_")}
    assert "differ" not in change_tables({**before, "machine": earlier}, after, names=("a", "b"))
    other = {**after, "machine": {**after["machine"], "cpu_stepping": "9"}, "variables": {"CAPPY_KERNELS": "none"}}
    assert "differ in their machine" in change_tables(before, other, names=("a", "b"))
    assert "variables" not in change_tables(before, other, names=("a", "b"))
    changed = change_tables({**other, "variables": {}}, other, names=("a", "b"))
    assert "The two differ in their variables" in changed
    other = {**after, "settings": {**after["settings"], "threads": 2}}
    assert "The two differ in their settings" in change_tables(before, other, names=("a", "b"))


def test_what_cannot_be_compared_is_named(measure: Measure) -> None:
    before, after = measure(FakeTool(spec("cappy")), FakeTool(spec("gone"))), measure(FakeTool(spec("cappy")))
    long = next(entry for entry in after["workloads"] if entry["name"] == "long")
    others = [{**entry, "sha256": "0" * 64} if entry is long else entry for entry in after["workloads"]]
    changed = change_tables(before, {**after, "workloads": others}, names=("a", "b"))
    assert "Not compared, since only one has them or their texts differ: long." in changed
    assert set(row_of(changed, "gone")[2:]) == {"-"}
    none = [{**entry, "sha256": entry["name"]} for entry in after["workloads"]]
    with pytest.raises(BenchmarkError, match=r"a\.json and b\.json have no workload in common: measure both with"):
        change_tables(before, {**after, "workloads": none}, names=("a.json", "b.json"))


@pytest.mark.slow
def test_latencies_stand_at_the_lengths_that_the_texts_have(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    """Short texts have no pair of 512 tokens, and a plot must not say so."""
    pairs = [(" ".join(["sky"] * (1 + place % 50)), f"blue {place}") for place in range(120)]
    short = make_workloads(pairs, tokenizer, SIZES, seed=0)
    result = run_on_fakes(short, tmp_path, [FakeTool(spec("cappy"))])
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "short.json").write_text(json.dumps(result))
    write_report(folder)
    labels = re.findall(r">([\d,]+)</text>", (folder / "short-latency.svg").read_text())
    steps = next(entry["steps"] for entry in result["workloads"] if entry["name"] == "lengths")
    assert "512" not in labels
    assert {str(step) for step in steps} <= set(labels)


def test_without_a_checkpoint_the_report_compares_with_nobody_and_says_so(measure: Measure, tmp_path: Path) -> None:
    result = measure(FakeTool(spec("cappy")), run=Run(has_checkpoint=False))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "alone.json").write_text(json.dumps(result), encoding="utf-8")
    text = write_report(tmp_path / "results").read_text(encoding="utf-8")
    assert NOT_COMPARED in text
    assert "Ours against each peer" not in text
    assert NOT_COMPARED in result_tables(result)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 2, "runners": []}'])
def test_a_file_that_is_not_a_result_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(BenchmarkError, match=r"other\.json is not a result of 'cappy bench run'"):
        write_report(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.slow
def test_the_committed_results_and_their_page_are_from_this_code(tmp_path: Path) -> None:
    """Its tables too are read from the JSON files, whose figures are measured and never written by hand."""
    folder = ROOT / "benchmarks" / "results"
    for path in folder.glob("*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    page = write_report(tmp_path)
    assert page.read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")


def test_a_report_without_a_runner_that_ran_has_no_plots(measure: Measure, tmp_path: Path) -> None:
    result = measure(FakeTool(spec("cappy"), fails_at="open"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "none.json").write_text(json.dumps(result), encoding="utf-8")
    page = write_report(tmp_path / "results")
    assert "no open today" in page.read_text(encoding="utf-8")
    assert not list(page.parent.glob("*.svg"))
