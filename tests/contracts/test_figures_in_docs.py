"""The tables of docs/benchmarks.md and README.md have the figures of their results, worked out anew here."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.support.places import ROOT

RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMED = re.compile(r"\*\* \(\[result\]\(\.\./benchmarks/results/([\w-]+)\.json\)\)")
"""What stands behind the bold title of a table whose rows are runners of one result."""
WORDS = {
    "openvino": "OpenVINO",
    "openvino-streams": "OpenVINO",
    "optimum-int8": "optimum",
    "sentence-transformers-onnx": "sentence-transformers on ONNX",
}
"""What the rerankers' table calls a runner, if not by its name."""
RERANKERS = {path.stem.removesuffix("-amd-epyc-avx2") for path in RESULTS.glob("*.json")} & {
    *"ms-marco-minilm-l6-v2 bge-reranker-base gte-reranker-modernbert-base mxbai-rerank-base-v1".split(),
    *"ettin-reranker-17m-v1 ettin-reranker-68m-v1".split(),
}
PEAKS = {"int8": ("int8",), "bf16": ("bf16", "fp32"), "fp32": ("fp32",), "fp16": ("fp32",)}

Runner = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table_behind(text: str, at: int) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the first table behind a place of a page."""
    lines = text[text.index("\n|", at) + 1 :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return header, rows


def seconds(runner: Runner, workload: str) -> list[list[float]]:
    """The times of every request in every round, also of a runner whose scores are wrong."""
    return next(cell["seconds"] for cell in runner["cells"] if cell["workload"] == workload)


def milliseconds(value: float) -> str:
    """Whole ones, and tenths below 20."""
    return f"{value:.1f}" if value < 20 else f"{value:,.0f}"


def speeds(result: dict[str, Any], runner: Runner) -> list[float]:
    """Useful tokens a second in bulk, round by round."""
    tokens = next(entry["tokens"] for entry in result["workloads"] if entry["name"] == "bulk")
    return [tokens / sum(each) for each in seconds(runner, "bulk")]


def bulk(result: dict[str, Any], runner: Runner) -> str:
    tokens = next(entry["tokens"] for entry in result["workloads"] if entry["name"] == "bulk")
    rounds = sorted(sum(each) for each in seconds(runner, "bulk"))
    middle = tokens / statistics.median(rounds)
    if runner["status"] == "wrong":
        return f"{middle:,.0f}"
    return f"{middle:,.0f} ({tokens / rounds[-1]:,.0f} to {tokens / rounds[0]:,.0f})"


def median_of(workload: str) -> Callable[[dict[str, Any], Runner], str]:
    def written(result: dict[str, Any], runner: Runner) -> str:
        return milliseconds(1000 * float(np.median([one for each in seconds(runner, workload) for one in each])))

    return written


def by_length(*wanted: int) -> Callable[[dict[str, Any], Runner], str]:
    def written(result: dict[str, Any], runner: Runner) -> str:
        steps = (16, 32, 64, 128, 256, 512)
        parts = np.array_split(np.median(np.array(seconds(runner, "lengths")), axis=0), len(steps))
        return ", ".join(milliseconds(1000 * float(np.median(parts[steps.index(length)]))) for length in wanted)

    return written


def of_peak(result: dict[str, Any], runner: Runner) -> str:
    if runner["status"] == "wrong":
        return ""
    (entry,) = (entry for entry in result["workloads"] if entry["name"] == "bulk")
    peak = max(result["peak"][name]["flops"] for name in PEAKS[runner["precision"]] if name in result["peak"])
    return f"{entry['flops'] / statistics.median(map(sum, seconds(runner, 'bulk'))) / peak:.0%}"


COLUMNS: dict[str, Callable[[dict[str, Any], Runner], str]] = {
    "precision": lambda result, runner: str(runner["precision"]),
    "bulk, useful tokens/s": bulk,
    "one pair, p50 ms": median_of("interactive"),
    "32, 128, 512 tokens, ms": by_length(32, 128, 512),
    "16 candidates, ms": median_of("rerank"),
    "of peak (bulk)": of_peak,
    "Spearman": lambda result, runner: f"{runner['parity']['spearman']:.4f}",
}
TIMES = [name for name in COLUMNS if name not in ("precision", "of peak (bulk)", "Spearman")]


def row(result: dict[str, Any], runner: Runner, columns: Sequence[str]) -> list[str]:
    """A runner's row, but its name."""
    is_wrong = runner["status"] == "wrong"
    cells = {name: COLUMNS[name](result, runner) for name in columns}
    return [f"wrong ({cell})" if is_wrong and name in TIMES else cell for name, cell in cells.items()]


def others(result: dict[str, Any], precision: str) -> list[Runner]:
    """The other tools with right scores."""
    found = [runner for runner in result["runners"] if runner["status"] == "ok" and not runner["is_ours"]]
    return [runner for runner in found if runner["precision"] == precision]


def best_in_bulk(result: dict[str, Any], precision: str) -> Runner | None:
    return max(others(result, precision), key=lambda runner: speed(result, runner), default=None)


def best_on_one(result: dict[str, Any], precision: str) -> Runner | None:
    return min(others(result, precision), key=pair_time, default=None)


def runner_of(result: dict[str, Any], name: str) -> Runner:
    return next(runner for runner in result["runners"] if runner["name"] == name.strip("*"))


def speed(result: dict[str, Any], runner: Runner) -> float:
    return statistics.median(speeds(result, runner))


def pair_time(runner: Runner) -> float:
    return float(np.median([one for each in seconds(runner, "interactive") for one in each]))


@pytest.mark.parametrize("name", NAMED.findall(BENCHMARKS))
def test_a_table_has_its_results_figures_and_the_fastest_other_tool(name: str) -> None:
    result = read(name)
    title = next(line for line in BENCHMARKS.splitlines() if f"results/{name}.json))" in line)
    assert title.count("[result]") == 1
    (_, *columns), rows = table_behind(BENCHMARKS, BENCHMARKS.index(f"results/{name}.json))"))
    for runner, *cells in rows:
        assert cells == row(result, runner_of(result, runner), columns), runner
    shown = [cells[0].strip("*") for cells in rows]
    assert [cells[0].startswith("**") for cells in rows] == [runner_of(result, one)["is_ours"] for one in shown]
    for precision in {cells[1] for cells in rows}:
        best = best_in_bulk(result, precision)
        assert best is None or best["name"] in shown


def test_all_whole_results_have_a_table() -> None:
    """Those of rerankers are in a table of their own."""
    whole = {path.stem for path in RESULTS.glob("cappy-*.json")}
    assert {*NAMED.findall(BENCHMARKS), "cappy-large-one-pair-amd-epyc-avx2"} == whole


def test_the_first_page_has_the_large_models_figures_and_the_best_other_tools() -> None:
    """Of other tools the best in bulk, whose Spearman correlation it is, and the best on one pair."""
    result = read("cappy-large-amd-epyc-avx-512-bf16")
    _, rows = table_behind(README, README.index("## How fast, how right"))
    expected: list[list[str]] = [[], [], []]
    for precision, name in (("fp32", "cappy"), ("bf16", "cappy-bf16"), ("int8", "cappy-int8")):
        ours = runner_of(result, name)
        in_bulk = best_in_bulk(result, precision)
        on_one = best_on_one(result, precision)
        assert in_bulk is not None
        assert on_one is not None
        expected[0] += [f"{speed(result, each):,.0f}" for each in (ours, in_bulk)]
        expected[1] += [milliseconds(1000 * pair_time(each)) for each in (ours, on_one)]
        expected[2] += [f"{each['parity']['spearman']:.4f}" for each in (ours, in_bulk)]
    assert [[cell.strip("*").removesuffix(", tied") for cell in cells[1:]] for cells in rows] == expected


def against(result: dict[str, Any], best: Runner | None, mine: Runner, workload: str) -> str:
    """A figure of the best other tool, its name, and how many times as fast ours is; less than 10% is tied."""
    if best is None:
        return "none is right"
    figure = f"{speed(result, best):,.0f}" if workload == "bulk" else milliseconds(1000 * pair_time(best))
    theirs, ours = ([sum(each) for each in seconds(runner, workload)] for runner in (best, mine))
    ratio = statistics.median(one / two for one, two in zip(theirs, ours, strict=True))
    times = f"{ratio:.2f} times" if not 1 / 1.1 < ratio < 1.1 else "tied"
    return f"{figure}, {WORDS.get(best['name'], best['name'])}: {times}"


def test_the_first_page_has_the_rerankers_figures() -> None:
    header, rows = table_behind(README, README.index("## Rerankers and reward models"))
    places = {name: header.index(name) for name in header}
    forms = [re.split(r",? ", cells[places["checkpoints, the first measured"]])[0].lower() for cells in rows]
    assert (len(forms), {*forms} <= RERANKERS) == (5, True)
    for form, cells in zip(forms, rows, strict=True):
        result = read(f"{form}-amd-epyc-avx2")
        for precision, name in (("fp32", "cappy"), ("int8", "cappy-int8")):
            best = best_in_bulk(result, precision)
            assert cells[places[precision]] == f"{speed(result, runner_of(result, name)):,.0f}", form
            other = "none is right" if best is None else f"{speed(result, best):,.0f}"
            assert cells[places[f"best other tool, {precision}"]] == other, form
        parity = {name: runner_of(result, name)["parity"] for name in ("cappy", "cappy-int8")}
        assert float(cells[places["fp32's error"]]) == float(f"{parity['cappy']['max_error']:.1e}"), form
        assert cells[places["int8's Spearman"]] == f"{parity['cappy-int8']['spearman']:.4f}", form


def test_the_rerankers_table_has_their_results_figures() -> None:
    _, rows = table_behind(BENCHMARKS, BENCHMARKS.index("### Rerankers and reward models"))
    forms = [cells[0].lower() for cells in rows if cells[0]]
    assert (len(rows), {*forms}) == (2 * len(RERANKERS), RERANKERS)
    for place, (_, precision, *cells) in enumerate(rows):
        result = read(f"{forms[place // 2]}-amd-epyc-avx2")
        mine = runner_of(result, "cappy" if precision == "fp32" else "cappy-int8")
        in_bulk, on_one = best_in_bulk(result, precision), best_on_one(result, precision)
        found = [f"{each['parity']['spearman']:.4f}" for each in (mine, in_bulk) if each is not None]
        assert cells == [
            f"{speed(result, mine):,.0f}",
            against(result, in_bulk, mine, "bulk"),
            milliseconds(1000 * pair_time(mine)),
            against(result, on_one, mine, "interactive"),
            ", ".join(dict.fromkeys(found)),
        ], forms[place // 2]
