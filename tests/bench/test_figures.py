"""Figures and ratios follow from the measured times."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_bench.shapes import count_parameters, read_shape
from cappy_bench.speed.figures import (
    MAX_RESULT_BYTES,
    Ratio,
    compare_with_peer,
    figures,
    is_as_right,
    read_result,
    useful_flops,
)
from cappy_bench.speed.tables import workload_table
from cappy_bench.speed.workloads import DESCRIPTIONS
from cappy_engine.cli.main import main
from cappy_engine.errors import BenchmarkError
from tests.support.fake_tools import FakeTool, Measure, row_of, runner_of, spec, true_score


def test_a_slowed_runner_is_exposed_with_its_ratio(measure: Measure) -> None:
    result = measure(FakeTool(spec("cappy")), FakeTool(spec("slow"), slowness=3.0))
    for name in DESCRIPTIONS:
        ratio = compare_with_peer(result, runner_of(result, "slow"), name)
        assert isinstance(ratio, Ratio)
        assert ratio.median == pytest.approx(3.0)
        assert row_of(workload_table(result, name), "slow")[-1].startswith("3.00x")


def test_ours_is_compared_in_the_fastest_precision_that_is_as_right(measure: Measure) -> None:
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


def test_a_share_of_the_peak_is_that_of_the_precision_computed_in(measure: Measure) -> None:
    """Where bfloat16 is emulated, and slower than float32, the products may be in float32."""
    tools = [FakeTool(spec(f"cappy-{name}", name)) for name in ("fp32", "bf16", "int8")]
    result = measure(*tools)
    shares = []
    for flops in (5e11, 4e12):
        peak = {**result["peak"], "bf16": {"flops": flops}}
        found = [figures({**result, "peak": peak}, each, result["workloads"][0]) for each in result["runners"]]
        shares.append([each.peak_share / found[0].peak_share for each in found if each and found[0]])
    assert shares == [[1, 1, 0.5], [1, 0.25, 0.5]]


def test_without_scores_as_right_as_the_peers_there_is_no_ratio(measure: Measure) -> None:
    ours8 = FakeTool(spec("cappy-int8", "int8"), score=lambda pair: round(true_score(pair), 1))
    result = measure(ours8, FakeTool(spec("exact")))
    assert compare_with_peer(result, runner_of(result, "exact"), "bulk") == "none of ours is as right"
    assert row_of(workload_table(result, "bulk"), "exact")[-1] == "none of ours is as right"


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


@pytest.mark.slow
def test_operations_of_a_gated_model_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    """But for its rotations by positions, which are small."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cappy_bench.make_checkpoint import make_family
    from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint

    folder = make_family(tmp_path / "made", "gte-reranker-modernbert-base", is_tiny=True)
    model, shape = load_model(open_checkpoint(folder)), read_shape(folder)
    products = {name: each.numel() for name, each in model.named_parameters() if each.ndim == 2}
    assert count_parameters(shape) == sum(size for name, size in products.items() if name != "classifier.weight")
    for length in (16, 500):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.int64))
        assert useful_flops(shape, [length]) == pytest.approx(counter.get_total_flops(), rel=0.02)


def without(parts: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [{each: value for each, value in part.items() if each != name} for part in parts]


def test_a_result_in_which_something_is_missing_or_changed_is_no_result(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, path = measure(FakeTool(spec("cappy"))), tmp_path / "result.json"
    stopped = [{**cell, "seconds": [[0.0]]} for cell in result["runners"][0]["cells"]]
    changed: list[dict[str, Any]] = [
        {"runners": without(result["runners"], "parity")},
        {"runners": [{**result["runners"][0], "parity": {}}]},
        {"runners": without(result["runners"], "setting")},
        {"runners": [{**result["runners"][0], "cells": stopped}]},
        {"runners": {"cappy": 1}},
        {"workloads": without(result["workloads"], "sha256")},
        {"peak": {}},
        {"machine": None},
    ]
    for changes in changed:
        path.write_text(json.dumps({**result, **changes}))
        assert main(["bench", "compare", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.search(r"result\.json is not a whole result .* measure again", err)
    path.write_text(json.dumps({name: part for name, part in result.items() if name != "started"}))
    assert main(["bench", "report", "--results", str(tmp_path)]) == 1
    assert "result.json is not a whole result" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()
    assert not list(tmp_path.glob("*.svg"))
    path.write_text(json.dumps(result))
    assert read_result(path) == json.loads(json.dumps(result))
    assert main(["bench", "compare", str(path)]) == 0


@pytest.mark.parametrize("name", ["max_error", "mean_error", "spearman", "winner_agreement"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_result_with_a_parity_that_is_not_finite_is_refused(
    measure: Measure, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    result, path = measure(FakeTool(spec("cappy")), FakeTool(spec("peer"))), tmp_path / "result.json"
    runner_of(result, "peer")["parity"][name] = "WAS A NUMBER"
    path.write_text(json.dumps(result).replace('"WAS A NUMBER"', value))
    told = rf"result\.json, peer: the parity's {name} is {float(value)}, not finite; measure again"
    for command in (["compare", str(path)], ["compare", str(path), str(path)], ["report", "--results", str(tmp_path)]):
        assert main(["bench", *command]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert re.search(told, err)
    assert [each.name for each in tmp_path.glob("*") if each.suffix in (".md", ".svg")] == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-0.5"])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda runner, value: runner.update(load_seconds=[1.0, value]), "load_seconds"),
        (lambda runner, value: runner.update(prepare_seconds=value), "prepare_seconds"),
        (lambda runner, value: runner["cells"][1]["seconds"][1].__setitem__(0, value), "seconds of lengths, round 2"),
    ],
    ids=["loading", "preparing", "scoring"],
)
def test_a_result_with_a_time_that_is_none_is_refused(
    change: Callable[[dict[str, Any], object], None],
    field: str,
    value: str,
    measure: Measure,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, path = measure(FakeTool(spec("cappy")), FakeTool(spec("peer"))), tmp_path / "result.json"
    change(runner_of(result, "peer"), "WAS A NUMBER")
    path.write_text(json.dumps(result).replace('"WAS A NUMBER"', value))
    for command in (["compare", str(path)], ["report", "--results", str(tmp_path)]):
        assert main(["bench", *command]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert f"result.json, peer: {field} has {float(value)}, which is not a time; measure again" in err


def test_what_is_not_a_result_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("[" * 100_000)
    with pytest.raises(BenchmarkError, match="is not a result of 'cappy bench run'"):
        read_result(path)
    with path.open("wb") as file:
        file.truncate(MAX_RESULT_BYTES + 1)
    for each, problem in ((path, f"more than {MAX_RESULT_BYTES} bytes"), (Path("/dev/zero"), "not a regular file")):
        with pytest.raises(OSError, match=problem):
            read_result(each)
