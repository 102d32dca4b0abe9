"""What a result says: figures derived from its measurements. Pure; a result is the JSON document that a run writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EXACT = 1e-4
"""Errors up to this are rounding: such scores count as equal, whichever of two is closer to the reference."""

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figures:
    """One runner on one workload.

    Times are medians over rounds; `spread` is the slowest and the fastest round's useful tokens per second. Latencies
    (milliseconds) are of single requests, all rounds together. `padding_share` is the part of the computed tokens that
    was padding, None where the tool does not show it. `peak_share` compares useful operations with the machine's peak.
    """

    workload: str
    runner: str
    rounds: int
    pairs_per_second: float
    tokens_per_second: float
    spread: tuple[float, float]
    latency: tuple[float, float, float]
    requests: int
    padding_share: float | None
    peak_share: float
    peak_bytes: int


def figures(result: Result, runner: Mapping[str, Any], workload: Mapping[str, Any]) -> Figures | None:
    """The figures of a runner (an entry of `runners`) on a workload; None unless it ran there and is not wrong."""
    cell = _cell(runner, workload["name"])
    if runner["status"] != "ok" or cell is None or cell["status"] != "ok":
        return None
    totals = [sum(seconds) for seconds in cell["seconds"]]
    total = statistics.median(totals)
    tokens = workload["tokens"]
    singles = [1000 * second for seconds in cell["seconds"] for second in seconds]
    computed = cell["computed_tokens"]
    peak = result["peak"]["int8" if runner["precision"] == "int8" else "fp32"]["flops"]
    p50, p95, p99 = (float(np.percentile(singles, share)) for share in (50, 95, 99))
    return Figures(
        workload=workload["name"],
        runner=runner["name"],
        rounds=len(totals),
        pairs_per_second=workload["pairs"] / total,
        tokens_per_second=tokens / total,
        spread=(tokens / max(totals), tokens / min(totals)),
        latency=(p50, p95, p99),
        requests=len(singles),
        padding_share=None if computed is None else 1 - tokens / computed,
        peak_share=workload["flops"] / total / peak,
        peak_bytes=cell["peak_bytes"],
    )


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one runner is as another on one workload: the median of the rounds' ratios, and their
    least and greatest."""

    ours: str
    peer: str
    workload: str
    median: float
    least: float
    greatest: float


def compare_with_peer(result: Result, peer: Mapping[str, Any], workload: str) -> Ratio | str | None:
    """Our fastest precision at equal or better parity than the peer's, against the peer; above 1 we are faster.

    A text says why there is no ratio, though both ran: our scores are nowhere as close to the reference. None where the
    peer did not run, or is wrong. A peer with wrong scores has no speed to compare with.
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
    return Ratio(runner["name"], peer["name"], workload, statistics.median(ratios), min(ratios), max(ratios))


def is_as_right(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether our parity is equal to or better than theirs: both exact, or ours no worse in rank correlation
    and in mean error."""
    if ours["max_error"] <= EXACT:
        return True
    if theirs["max_error"] <= EXACT:
        return False
    return bool(ours["spearman"] >= theirs["spearman"] and ours["mean_error"] <= theirs["mean_error"])


def paired_ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Their time over ours, round by round; a side that ran fewer rounds lends its median to the others."""
    rounds = max(len(theirs), len(ours))
    their, our = (side if len(side) == rounds else [statistics.median(side)] * rounds for side in (theirs, ours))
    return [one / other for one, other in zip(their, our, strict=True)]


def useful_flops(shape: Mapping[str, int], lengths: Sequence[int]) -> float:
    """Operations of a RoBERTa encoder for pairs of `lengths` tokens; a multiplication and an addition are two.

    The matrix products of every layer, and the two products of attention; embeddings, softmax, norms and the head are
    left out (below 1% of cappy-large).
    """
    hidden, wide, layers = shape["hidden_size"], shape["intermediate_size"], shape["layers"]
    tokens = np.asarray(lengths, dtype=np.float64)
    per_layer = 2 * tokens * (4 * hidden**2 + 2 * hidden * wide) + 4 * tokens**2 * hidden
    return float(layers * per_layer.sum())


def _seconds(runner: Mapping[str, Any], workload: str) -> list[float] | None:
    cell = _cell(runner, workload)
    if runner["status"] != "ok" or cell is None or cell["status"] != "ok":
        return None
    return [sum(seconds) for seconds in cell["seconds"]]


def _cell(runner: Mapping[str, Any], workload: str) -> Mapping[str, Any] | None:
    return next((cell for cell in runner["cells"] if cell["workload"] == workload), None)
