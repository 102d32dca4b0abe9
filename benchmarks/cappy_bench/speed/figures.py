"""Derives figures from a result's measurements. A result is the JSON document that a run writes."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cappy_engine.errors import BenchmarkError
from cappy_engine.storage import read_regular

SCHEMA = 1
MAX_RESULT_BYTES = 64 * 2**20

EXACT = 1e-4
"""Errors up to this are rounding: such scores count as equal, whichever of two is closer to the reference."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figures:
    """One runner on a workload.

    Times are medians over rounds; `spread` is the slowest and the fastest round's useful tokens per second. Latencies
    (milliseconds) are of single requests, all rounds together; `requests` counts one that each round repeats once.
    `padding_share` is the part of the computed tokens that
    was padding; None where the tool does not show it. `peak_share` compares useful operations with the machine's peak.
    """

    workload: str
    pairs_per_second: float
    tokens_per_second: float
    spread: tuple[float, float]
    latency: tuple[float, float, float]
    requests: int
    padding_share: float | None
    peak_share: float
    peak_bytes: int


def read_result(path: Path) -> Result:
    """Read the result that `cappy bench run` wrote.

    Raises OSError, and BenchmarkError for any other file, and for a parity or a time that cannot be.

    >>> read_result(Path("bench/results/cappy-mini.json"))["title"]
    'cappy-mini'
    """
    try:
        document = json.loads(read_regular(path, limit=MAX_RESULT_BYTES))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not a result of 'cappy bench run': {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or "runners" not in document:
        raise BenchmarkError(f"{path} is not a result of 'cappy bench run' of schema {SCHEMA}")
    with taken_from(path):
        for runner in document["runners"]:
            check_parity(runner["parity"] or {}, f"{path}, {runner['name']}", "measure again")
            _check_seconds(runner, f"{path}, {runner['name']}")
    return document


def _check_seconds(runner: Mapping[str, Any], where: str) -> None:
    """Raise BenchmarkError for a time that is not a number of seconds. The error names its field."""
    fields = {"load_seconds": runner["load_seconds"], "prepare_seconds": [runner.get("prepare_seconds") or 0.0]}
    for cell in runner["cells"]:
        for place, seconds in enumerate(cell["seconds"], 1):
            fields[f"seconds of {cell['workload']}, round {place}"] = seconds
    for field, seconds in fields.items():
        for second in seconds:
            if not 0 <= second < math.inf:
                raise BenchmarkError(f"{where}: {field} has {second}, which is not a time; measure again")


def check_parity(parity: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise BenchmarkError for a figure that is not finite. It says `where` the figure stands, and gives `advice`.

    >>> check_parity({"spearman": float("nan")}, "result.json, torch", "measure again")
    Traceback (most recent call last):
    cappy_engine.errors.BenchmarkError: result.json, torch: the parity's spearman is nan, not finite; measure again
    """
    for name, value in parity.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BenchmarkError(f"{where}: the parity's {name} is {value}, not finite; {advice}")


@contextlib.contextmanager
def taken_from(path: Path) -> Iterator[None]:
    """Raise BenchmarkError for what a result lacks, while tables are made of it: it was read of `path`.

    >>> with taken_from(path):
    ...     text = result_tables(read_result(path))
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BenchmarkError(
            f"{path} is not a whole result of 'cappy bench run' ({type(error).__name__}: {error}): it was changed, or "
            "another version wrote it; measure again"
        ) from error


def figures(result: Result, runner: Mapping[str, Any], workload: Mapping[str, Any]) -> Figures | None:
    """Derive the figures of a runner, an entry of `runners`, on a workload.

    None unless it ran there and is not wrong.

    >>> figures(result, result["runners"][0], result["workloads"][0]).tokens_per_second
    1234.5
    """
    cell = good_cell(runner, workload["name"])
    if cell is None:
        return None
    totals = [sum(seconds) for seconds in cell["seconds"]]
    total = statistics.median(totals)
    tokens = workload["tokens"]
    singles = [1000 * second for seconds in cell["seconds"] for second in seconds]
    computed = cell["computed_tokens"]
    peak = _peak(result, runner["precision"])
    p50, p95, p99 = (float(np.percentile(singles, share)) for share in (50, 95, 99))
    return Figures(
        workload=workload["name"],
        pairs_per_second=workload["pairs"] / total,
        tokens_per_second=tokens / total,
        spread=(tokens / max(totals), tokens / min(totals)),
        latency=(p50, p95, p99),
        requests=max(map(len, cell["seconds"])),
        padding_share=None if computed is None else 1 - tokens / computed,
        peak_share=workload["flops"] / total / peak,
        peak_bytes=cell["peak_bytes"],
    )


def good_cell(runner: Mapping[str, Any], workload: str) -> Mapping[str, Any] | None:
    """Find what a runner did on a workload; None unless it ran there and is not wrong.

    >>> good_cell(result["runners"][0], "bulk")["seconds"]
    [[3.1], [3.0]]
    """
    cells = (cell for cell in runner["cells"] if cell["workload"] == workload and cell["status"] == "ok")
    return next(cells, None) if runner["status"] == "ok" else None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one runner is as another, round by round."""

    ours: str
    median: float
    least: float
    greatest: float


def compare_with_peer(result: Result, peer: Mapping[str, Any], workload: str) -> Ratio | str | None:
    """Compare a peer with our fastest precision of equal or better parity.

    Above 1 we are faster. A text says why there is no ratio though both ran: none of ours is as close to the reference.
    None where the peer did not run, or is wrong: a peer with wrong scores has no speed to compare with.

        >>> compare_with_peer(result, result["runners"][3], "bulk").median
        1.21
    """
    theirs = _seconds(peer, workload)
    if theirs is None:
        return None
    ours = [
        (runner, seconds)
        for runner in result["runners"]
        if runner["is_ours"] and (seconds := _seconds(runner, workload)) is not None
    ]
    fit = [(runner, seconds) for runner, seconds in ours if is_as_right(runner["parity"], peer["parity"])]
    if not fit:
        return "none of ours is as right" if ours else None
    runner, seconds = min(fit, key=lambda entry: statistics.median(entry[1]))
    ratios = paired_ratios(theirs, seconds)
    return Ratio(runner["name"], statistics.median(ratios), min(ratios), max(ratios))


def is_as_right(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """True if our parity is equal to or better than theirs.

    Two exact ones are equal; else ours must be no worse in rank correlation and in mean error.

        >>> is_as_right({"max_error": 2e-5}, {"max_error": 1e-6})
        True
    """
    if ours["max_error"] <= EXACT:
        return True
    if theirs["max_error"] <= EXACT:
        return False
    return bool(ours["spearman"] >= theirs["spearman"] and ours["mean_error"] <= theirs["mean_error"])


def paired_ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Divide their time by ours, round by round.

    A side that ran fewer rounds lends its median to the others.

    >>> paired_ratios([2.0, 3.0], [1.0])
    [2.0, 3.0]
    """
    rounds = max(len(theirs), len(ours))
    their, our = (side if len(side) == rounds else [statistics.median(side)] * rounds for side in (theirs, ours))
    return [one / other for one, other in zip(their, our, strict=True)]


def useful_flops(shape: Mapping[str, int], lengths: Sequence[int]) -> float:
    """Count the operations of an encoder for pairs of `lengths` tokens.

    A multiply-add is two. Counted are the matrix products of every layer (`wide_products` in the feed-forward: 2, or 3
    with a gate), and the two products of attention between all tokens; without embeddings, softmax, norms and the head
    (below 1% of cappy-large), and without DeBERTa's products with positions.

        >>> useful_flops({"hidden_size": 8, "intermediate_size": 32, "layers": 2}, [3])
        9792.0
    """
    hidden, wide, layers = shape["hidden_size"], shape["intermediate_size"], shape["layers"]
    tokens, products = np.asarray(lengths, dtype=np.float64), shape.get("wide_products", 2)
    per_layer = 2 * tokens * (4 * hidden**2 + products * hidden * wide) + 4 * tokens**2 * hidden
    return float(layers * per_layer.sum())


def _peak(result: Result, precision: str) -> float:
    """Return the most operations per second in `precision`. For bf16, it is float32's peak where that is higher."""
    computed = {"int8": ("int8",), "bf16": ("bf16", "fp32")}.get(precision, ("fp32",))
    return max(float(result["peak"][name]["flops"]) for name in computed if name in result["peak"])


def _seconds(runner: Mapping[str, Any], workload: str) -> list[float] | None:
    cell = good_cell(runner, workload)
    return None if cell is None else [sum(seconds) for seconds in cell["seconds"]]
