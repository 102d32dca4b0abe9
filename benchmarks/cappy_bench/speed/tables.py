"""Writes a result as tables, for `compare` and for the report. Pure: a result in, text out."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cappy_bench.machine import NUMBERS, cpu_kind
from cappy_bench.peers.specs import Spec
from cappy_bench.speed.figures import Figures, Ratio, Result, compare_with_peer, figures
from cappy_bench.speed.markdown import Row, beside, error, markdown, number, size
from cappy_engine.errors import BenchmarkError

WORKLOAD_COLUMNS = (
    *("runner", "precision", "pairs/s", "useful tokens/s", "p50 ms", "p95 ms", "p99 ms", "padding", "of peak"),
    *("memory", "max error", "Spearman", "ours against it"),
)
SINGLE = ("interactive", "rerank")
"""Workloads of like requests, whose latencies mean something."""
NOT_COMPARED = (
    "No checkpoint was given, so only this engine was measured; its parity is the one that the export measured "
    "on its own pairs."
)
ADDED = ("variables",)
"""Parts that earlier results lack."""
LEAST_REQUESTS = (1, 20, 100)
"""How many different requests a 50th, 95th and 99th percentile needs to be shown: a repeated one says nothing new."""


def result_tables(result: Result) -> str:
    """Write every table of one result.

    >>> print(result_tables(read_result(Path("bench/results/cappy-mini.json"))))
    """
    parts = [f"{result['title']}: {cpu_kind(result['machine'])}, {result['settings']['threads']} threads"]
    if result["reference"] is None:
        parts.append(NOT_COMPARED)
    for workload in result["workloads"]:
        size_of = f"{workload['pairs']} pairs, {workload['tokens']} tokens"
        parts.append(f"{workload['name']}: {workload['description']} ({size_of})")
        parts.append(workload_table(result, workload["name"]))
    parts.append(runner_table(result))
    missing = missing_table(result)
    parts += ["Did not run:", missing] if missing else ["All runners ran."]
    return "\n\n".join(parts) + "\n"


def change_tables(before: Result, after: Result, *, names: tuple[str, str]) -> str:
    """Write what changed from one result to another, and the differences of their conditions.

    `names` are those of their files. Raises BenchmarkError if they have no workload in common.

    >>> print(change_tables(before, after, names=("before.json", "after.json")))
    """
    shared, every = _digests(before) & _digests(after), _digests(before) | _digests(after)
    if not shared:
        raise BenchmarkError(
            f"{names[0]} and {names[1]} have no workload in common: measure both with the same texts, suite and seed"
        )
    parts = [f"useful tokens/s of {names[1]} over those of {names[0]}", _change_table(before, after)]
    if shared != every:
        left_out = sorted({name for name, _ in every - shared})
        parts.append(f"Not compared, since only one has them or their texts differ: {', '.join(left_out)}.")
    parts += [
        f"The two differ in their {name}, so these ratios compare that too."
        for name in ("machine", "model", "settings", *ADDED)
        if _differ(before, after, name)
    ]
    return "\n\n".join(parts)


def _digests(result: Result) -> set[tuple[str, str]]:
    return {(entry["name"], entry["sha256"]) for entry in result["workloads"]}


def _identity(result: Result, name: str) -> object:
    """Return the part that must be equal for a comparison; of a model, its weights."""
    return result["model"]["weights_sha256"] if name == "model" else result[name]


def _differ(before: Result, after: Result, name: str) -> bool:
    """True if a part is not the same, as far as both can have it: earlier results lack some fields."""
    if name in ADDED and not (name in before and name in after):
        return False
    one, other = _identity(before, name), _identity(after, name)
    if name == "machine":
        told = [field for field in NUMBERS if field in before[name] and field in after[name]]
        one, other = (
            {field: part[field] for field in part if field in told or field not in NUMBERS}
            for part in (before[name], after[name])
        )
    return one != other


def setting_table(specs: Sequence[Spec]) -> str:
    """List the runners with their settings.

    >>> print(setting_table(SPECS))
    """
    rows = [(spec.name, spec.precision, spec.environment, spec.setting) for spec in specs]
    return markdown(("runner", "precision", "environment", "setting"), rows)


def workload_table(result: Result, name: str) -> str:
    """Write every runner on one workload: fastest first, then wrong ones and missing ones.

    >>> print(workload_table(result, "bulk"))
    """
    workload = next(entry for entry in result["workloads"] if entry["name"] == name)
    ran: list[tuple[float, Row]] = []
    others: list[Row] = []
    for runner in result["runners"]:
        found = figures(result, runner, workload)
        if found is not None:
            ran.append((-found.tokens_per_second, _row(result, runner, found)))
        elif runner["status"] == "wrong":
            others.append(
                (_name(runner), runner["precision"], *["wrong"] * (len(WORKLOAD_COLUMNS) - 3), _reason(runner))
            )
        elif runner["status"] == "ok":
            cell = next(cell for cell in runner["cells"] if cell["workload"] == name)
            reason = cell["reason"] or cell["status"]
            others.append((_name(runner), runner["precision"], *["-"] * (len(WORKLOAD_COLUMNS) - 3), reason))
    return markdown(WORKLOAD_COLUMNS, [row for _, row in sorted(ran)] + others)


def _row(result: Result, runner: Mapping[str, Any], found: Figures) -> Row:
    has_latency, parity = found.workload in SINGLE, runner["parity"]
    low, high = found.spread
    return (
        _name(runner),
        runner["precision"],
        number(found.pairs_per_second),
        f"{number(found.tokens_per_second)} ({number(low)} to {number(high)})",
        *(
            number(latency) if has_latency and found.requests >= least else ""
            for latency, least in zip(found.latency, LEAST_REQUESTS, strict=True)
        ),
        "?" if found.padding_share is None else f"{found.padding_share:.0%}",
        f"{found.peak_share:.0%}",
        size(found.peak_bytes),
        "-" if parity is None else error(parity["max_error"]),
        "-" if parity is None else f"{parity['spearman']:.4f}",
        "" if runner["is_ours"] else verdict(compare_with_peer(result, runner, found.workload)),
    )


def verdict(ratio: Ratio | str | None) -> str:
    """Say who is faster: one wins if every round says so, else they are even.

    >>> verdict(Ratio("cappy", median=1.5, least=1.2, greatest=1.6))
    '1.50x (1.20 to 1.60) cappy'
    """
    if not isinstance(ratio, Ratio):
        return ratio or ""
    times = f"{ratio.median:.2f}x ({ratio.least:.2f} to {ratio.greatest:.2f})"
    if ratio.greatest < 1:
        return f"**{times}: the peer wins** over {ratio.ours}"
    return f"{times} {ratio.ours}" if ratio.least > 1 else f"{times} {ratio.ours}, even"


def ratio_table(result: Result) -> str:
    """Write our ratio against each peer on each workload, at equal or better parity.

    >>> print(ratio_table(result))
    """
    names = [workload["name"] for workload in result["workloads"]]
    rows = []
    for runner in result["runners"]:
        if runner["is_ours"] or runner["status"] not in ("ok", "wrong"):
            continue
        cells = [
            "wrong" if runner["status"] == "wrong" else _short(compare_with_peer(result, runner, name))
            for name in names
        ]
        rows.append((runner["name"], runner["precision"], *cells))
    return markdown(("peer", "precision", *names), rows)


def _short(ratio: Ratio | str | None) -> str:
    if not isinstance(ratio, Ratio):
        return ratio or "-"
    if ratio.greatest < 1:
        return f"**{ratio.median:.2f} peer wins**"
    return f"{ratio.median:.2f}" if ratio.least > 1 else f"{ratio.median:.2f} even"


def share_table(result: Result) -> str:
    """Write every runner's share of the machine's peak on each workload.

    >>> print(share_table(result))
    """
    names = [workload["name"] for workload in result["workloads"]]
    rows = []
    for runner in result["runners"]:
        if runner["status"] != "ok":
            continue
        found = [figures(result, runner, workload) for workload in result["workloads"]]
        rows.append(
            (_name(runner), runner["precision"], *("-" if each is None else f"{each.peak_share:.0%}" for each in found))
        )
    return markdown(("runner", "precision", *names), rows)


def runner_table(result: Result) -> str:
    """Write settings, versions, start-up and parity of every runner that ran.

    >>> print(runner_table(result))
    """
    rows = []
    for runner in result["runners"]:
        if runner["status"] not in ("ok", "wrong"):
            continue
        parity = runner["parity"]
        rows.append(
            (
                _name(runner),
                runner["precision"],
                runner["setting"],
                ", ".join(f"{name} {version}" for name, version in runner["versions"].items()),
                f"{statistics.median(runner['load_seconds']):.1f}" if runner["load_seconds"] else "-",
                *_parity_cells(parity),
                "" if runner["status"] == "ok" else f"**wrong**: {_reason(runner)}",
            )
        )
    columns = ("runner", "precision", "setting", "versions", "load s", "max error", "mean error", "Spearman")
    return markdown((*columns, "winners kept", ""), rows)


def _parity_cells(parity: Mapping[str, Any] | None) -> Row:
    if parity is None:
        return ("-",) * 4
    kept = parity["winner_agreement"]
    return (
        error(parity["max_error"]),
        error(parity["mean_error"]),
        f"{parity['spearman']:.5f}",
        "-" if kept is None else f"{kept:.1%}",
    )


def missing_table(result: Result) -> str:
    """Write the runners that could not run, with the exact reason; empty if all ran.

    >>> missing_table(result)
    ''
    """
    rows = [
        (runner["name"], runner["precision"], runner["status"], runner["reason"])
        for runner in result["runners"]
        if runner["status"] in ("skipped", "failed")
    ]
    return markdown(("runner", "precision", "status", "reason"), rows) if rows else ""


def _change_table(before: Result, after: Result) -> str:
    """Write how each runner's useful tokens per second changed, on workloads that both share.

    A runner that one of them lacks, or that was wrong or failed in one, has a dash.
    """
    shared = {entry["sha256"]: entry for entry in before["workloads"]}
    workloads = [entry for entry in after["workloads"] if entry["sha256"] in shared]
    earlier, later = ({one["name"]: one for one in result["runners"]} for result in (before, after))
    rows = []
    for name, runner in (later | earlier).items():
        cells = []
        for workload in workloads:
            new = figures(after, later[name], workload) if name in later else None
            old = figures(before, earlier[name], workload) if name in earlier else None
            cells.append("-" if new is None or old is None else f"{new.tokens_per_second / old.tokens_per_second:.2f}x")
        rows.append((runner["name"], runner["precision"], *cells))
    return markdown(("runner", "precision", *(workload["name"] for workload in workloads)), rows)


def _reason(runner: Mapping[str, Any]) -> str:
    """Say why a runner is wrong. Earlier results may have a value and its limit alike, in too few digits."""
    reason = str(runner["reason"])
    found = re.fullmatch(r"Spearman (\S+), limit (\S+)", reason)
    if found is None or float(found[1]) != float(found[2]):
        return reason
    return f"Spearman {beside(runner['parity']['spearman'], float(found[2]), '3f')}, limit {found[2]}"


def _name(runner: Mapping[str, Any]) -> str:
    return f"**{runner['name']}**" if runner["is_ours"] else str(runner["name"])
