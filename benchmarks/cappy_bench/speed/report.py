"""Writes results as a page that explains itself: Markdown with plots, beside its JSON files."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np

from cappy_bench.machine import cpu_kind
from cappy_bench.speed.figures import Result, figures, good_cell, read_result, taken_from
from cappy_bench.speed.marks import Bar, Line, Point
from cappy_bench.speed.plots import draw_error_speed, draw_latency, draw_throughput
from cappy_bench.speed.tables import NOT_COMPARED, missing_table, ratio_table, runner_table, share_table, workload_table
from cappy_bench.speed.workloads import LENGTHS
from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.bulk.output.places import check_output
from cappy_engine.errors import BenchmarkError

PAGE = "README.md"
PLOTTED = ("bulk", "rerank", "interactive", "long")

OF_OTHERS = ("gpu-", "serve-", "amx-")
"""How the names of other measurements begin. They have no runners, so nothing of them is in the report."""
INTRODUCTION = """# Benchmarks

Parity and speed of this engine beside what one would use instead, from the JSON files in this folder; made by
`cappy bench report --results benchmarks/results`. How to read it:

- *Useful tokens* are those of the pairs; what a runner pads counts for nothing. Texts go in and scores come out:
  tokenisation is part of every time, loading is not.
- Every runner scores the same pairs, and gives the model the same token ids (checked). Scores are compared with PyTorch
  in float32, eager, one pair at a time; max error is the greatest over all rounds and all pairs.
- **A runner whose scores are wrong has no speed**: its row reads "wrong", everywhere. Wrong is an error above 1e-4 in
  fp32 or 5e-3 in fp16 (times the standard deviation of the scores, where that is above 1), a Spearman correlation
  below 0.995 in bf16 or 0.97 in int8, another tokenisation, or a score that is not a number.
- Every result is of one kind of CPU, which the headings name. Speeds of two kinds cannot be compared.
- *Ours against it*: the peer's time over ours, taking our fastest precision whose parity is equal to the peer's or
  better (errors up to 1e-4 count as equal: they are rounding). The median of the rounds' ratios, with their least and
  greatest. Where every round says so, one of the two wins; else they are even.
- *Of peak*: useful operations per second over the most that a matrix product of PyTorch or ONNX Runtime reached in the
  same run, in int8 for int8 and in float32 for the others. For bf16 it is bfloat16's, or float32's where that is
  higher. Faster products, or a machine whose speed changes, can give more than 100%. DeBERTa's products with positions
  do not count as useful.
- All runners of a run take turns, in the reverse order in the next round, in processes of their own, which stay loaded
  while memory allows (a reload shows as a second load time in the JSON).
- Memory is the most that was resident in the runner's process while it scored, the model included. Linux counts a
  file's pages once for each mapping: weights that two sessions map are in memory once, and count twice.
- Latencies are those of the requests of all rounds together. 95th percentiles are given from 20 different requests on,
  99th from 100 on.
"""


def write_report(folder: Path, *, force: bool = False) -> Path:
    """Render every result of `folder` into its README.md and plots; return the page's path.

    Raises BenchmarkError for a folder without results, with another JSON file, or with a result that lacks a part.
    Raises OutputError if a file of the page exists and `force` is not set.

        >>> write_report(Path("bench/results"))
        PosixPath('bench/results/README.md')
    """
    paths = sorted(path for path in folder.glob("*.json") if not _is_of_others(path))
    if not paths:
        raise BenchmarkError(f"no result (*.json) in {folder}; make one with 'cappy bench run'")
    results = {path: read_result(path) for path in paths}
    page, plots, sections = folder / PAGE, list[Path](), [INTRODUCTION]
    for path, result in results.items():
        with taken_from(path):
            plots += [folder / f"{path.stem}-{name}.svg" for name in _plots(result)]
            sections.append(section(result, path.stem))
    for each in (page, *plots):
        check_output(each, force=force)
    for path, result in results.items():
        draw_plots(result, folder, path.stem)
    with open_output(page, force=True) as file:
        file.write("\n".join(sections).encode())
    return page


def _is_of_others(path: Path) -> bool:
    return path.name.startswith(OF_OTHERS) and b'"runners"' not in path.read_bytes()


def section(result: Result, stem: str) -> str:
    """Write one result in Markdown; its plots are files of `stem`.

    >>> print(section(result, "cappy-mini"))
    """
    cpu = cpu_kind(result["machine"])
    parts = [
        f"## {result['title']} on {cpu}\n",
        _conditions(result),
        *(f"![{what}]({stem}-{name}.svg)\n" for name, what in _plots(result).items()),
        *_against_peers(result, cpu),
        f"### Share of the machine's peak, on {cpu}\n",
        _peaks(result),
        share_table(result) + "\n",
        f"### Runners, and how right they are, on {cpu}\n",
        *_compared(result),
        runner_table(result) + "\n",
    ]
    missing = missing_table(result)
    parts += ["### Did not run\n", missing + "\n"] if missing else ["All runners ran.\n"]
    for workload in result["workloads"]:
        lengths = workload["lengths"]
        parts += [
            f"### {workload['name']}, on {cpu}\n",
            f"{workload['description']}. {workload['pairs']} pairs in {workload['requests']} requests, "
            f"{workload['tokens']:,} tokens that count (lengths p5 {lengths['p5']:.0f}, p50 {lengths['p50']:.0f}, "
            f"p95 {lengths['p95']:.0f}, max {lengths['max']}).\n",
            workload_table(result, workload["name"]) + "\n",
        ]
    return "\n".join(parts)


def _against_peers(result: Result, cpu: str) -> list[str]:
    if result["reference"] is None:
        return [f"{NOT_COMPARED}\n"]
    return [
        f"### Ours against each peer, on {cpu}\n",
        "The peer's time over ours, by workload, at equal or better parity. Above 1 ours is faster. Which precision of "
        "ours it was stands in the tables of the workloads: where our int8 is less right than a peer's, it is fp32.\n",
        ratio_table(result) + "\n",
    ]


def _compared(result: Result) -> list[str]:
    """Say on how many pairs the runners were judged."""
    counts = {runner["parity"]["pairs"] for runner in result["runners"] if runner["parity"]}
    if result["reference"] is None or not counts:
        return []
    proof = result.get("proof")  # not in earlier results
    more = f", of which {proof['pairs']} were scored once, without a time" if proof else ""
    return [f"Errors and correlations are those of {max(counts)} pairs{more}.\n"]


def draw_plots(result: Result, folder: Path, stem: str) -> None:
    """Draw the result's plots, as SVG files of `stem`; an empty plot is left out.

    >>> draw_plots(result, Path("bench/results"), "cappy-mini")
    """
    title = f"{result['title']} ({cpu_kind(result['machine'])}, {result['settings']['threads']} threads)"
    plots = _plots(result)
    if "throughput" in plots:
        draw_throughput(_bars(result), folder / f"{stem}-throughput.svg", title=title)
    if "latency" in plots:
        draw_latency(_lines(result), folder / f"{stem}-latency.svg", title=title)
    if "error" in plots:
        draw_error_speed(_points(result), folder / f"{stem}-error.svg", title=title)


def _plots(result: Result) -> dict[str, str]:
    """Name the plots that have something to show, with their captions."""
    plots = {}
    if any(not bar.is_wrong for bar in _bars(result)):
        plots["throughput"] = "Useful tokens per second by workload and runner"
    if _lines(result):
        plots["latency"] = "Median latency of one pair against its length"
    if _points(result):
        plots["error"] = "Error against speed"
    return plots


def _bars(result: Result) -> list[Bar]:
    bars = []
    for workload in result["workloads"]:
        for runner in result["runners"]:
            found = figures(result, runner, workload)
            if workload["name"] in PLOTTED and (found is not None or runner["status"] == "wrong"):
                bars.append(
                    Bar(
                        workload=workload["name"],
                        runner=runner["name"],
                        precision=runner["precision"],
                        is_ours=runner["is_ours"],
                        tokens_per_second=0.0 if found is None else found.tokens_per_second,
                        spread=(0.0, 0.0) if found is None else found.spread,
                        is_wrong=found is None,
                    )
                )
    return bars


def _lines(result: Result) -> list[Line]:
    """Take the median latency at each length of the workload `lengths`.

    Its requests come length by length, as many of each. Texts without such lengths give fewer points.
    """
    lines = []
    found_steps = (entry.get("steps", LENGTHS) for entry in result["workloads"] if entry["name"] == "lengths")
    tokens = next(found_steps, LENGTHS)
    for runner in result["runners"]:
        if (cell := good_cell(runner, "lengths")) is not None:
            seconds = np.median(np.array(cell["seconds"]), axis=0)
            groups = np.array_split(seconds, len(LENGTHS))
            found = {length: 1000 * float(np.median(group)) for length, group in zip(tokens, groups, strict=True)}
            at, milliseconds = zip(*sorted(found.items()), strict=True)
            lines.append(Line(runner["name"], runner["precision"], runner["is_ours"], list(at), list(milliseconds)))
    return lines


def _points(result: Result) -> list[Point]:
    bulk = [workload for workload in result["workloads"] if workload["name"] == "bulk"]
    found = [(runner, figures(result, runner, workload)) for workload in bulk for runner in result["runners"]]
    return [
        Point(
            runner["name"],
            runner["precision"],
            runner["is_ours"],
            runner["parity"]["max_error"],
            figure.tokens_per_second,
        )
        for runner, figure in found
        if figure is not None and runner["parity"] is not None
    ]


def _conditions(result: Result) -> str:
    machine, settings, model = result["machine"], result["settings"], result["model"]
    shape = model["shape"]
    when = f"started {result['started']}, {result['seconds'] / 60:.0f} minutes"
    if result["is_resumed"]:
        when = f"interrupted, and resumed {result['started']}"
    return (
        f"{model['name']}: {shape['layers']} layers, hidden {shape['hidden_size']}, {model['parameters'] / 1e6:.0f} M "
        f"parameters. {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instruction_sets'])}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, Python {machine['python']}; "
        f"{settings['threads']} threads. Texts: {settings['pairs']}, seed {settings['seed']}. "
        f"{settings['rounds']} rounds (one for a workload that took a runner over {settings['max_seconds']:.0f} s), "
        f"{when}. Commit {result['commit']}.\n"
    )


def _peaks(result: Result) -> str:
    texts = []
    for precision, best in result["peak"].items():
        rounds = ", ".join(f"{flops / 1e9:.0f}" for flops in best["rounds"])
        texts.append(
            f"{precision}: {best['flops'] / 1e9:.0f} Gop/s ({best['how']}; by round {rounds}, "
            f"median {statistics.median(best['rounds']) / 1e9:.0f})"
        )
    return f"The peak that was measured in this run, {'; '.join(texts)}.\n"
