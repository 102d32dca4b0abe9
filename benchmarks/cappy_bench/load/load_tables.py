"""Writes a result of `cappy bench serve` as tables for people."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from cappy_bench.load.bounds import STEPS
from cappy_bench.speed.markdown import Row, markdown, number, size

QUEUE = "CAPPY_SERVE_MAX_QUEUE_PAIRS and CAPPY_SERVE_MAX_QUEUE_TOKENS"
Step = Mapping[str, Any]


def load_tables(result: Mapping[str, Any]) -> str:
    """Write all tables of a result, with the load and the scorer's throughput above them.

    >>> print(load_tables(result))
    """
    load, offline = result["load"], result["offline"]
    parts = [
        f"{load['requests']} requests of {', '.join(load['requests_by_pairs'])} pairs, {load['tokens']:,} tokens "
        f"({load['texts']}). Scorer.score alone: {offline['tokens_per_second']:,.0f} tokens/s, "
        f"{offline['pairs_per_second']:,.0f} pairs/s."
    ]
    for server in result["servers"]:
        if server["status"] != "ok":
            parts.append(f"{server['name']}: {server['status']}, {server['reason']}")
            continue
        if not server.get("is_here", True):
            problem = "is not an address of this machine: its times are not compared with Scorer.score's on this one."
            parts.append(f"{server['url']} {problem}")
        parts += [_heading(server), outcome_table(server), latency_table(server), resource_table(server)]
        parts += _problems(server)
        if server.get("bounds"):
            parts.append(bound_table(server))
    return "\n\n".join(parts)


def _heading(server: Step) -> str:
    """Say which server it is, and how fast it is at most."""
    info, saturation = server.get("info"), server["saturation"]
    setting = f"{info['device']}, {info['precision']}, {info['threads']} threads" if info else server.get("setting", "")
    ready = server["ready_seconds"]
    return (
        f"{server['name']} ({setting}), {server['connections']} connections: "
        f"{number(saturation['tokens_per_second'])} tokens/s, {number(saturation['requests_per_second'])} requests/s"
        + (f"; ready after {ready:.2f} s" if ready is not None else "")
    )


def _problems(server: Step) -> list[str]:
    """Say where no request was accepted, why requests failed, and how a server ended badly."""
    lines = []
    for name, step in _steps(server):
        if step["accepted"]["p99"] is None:
            lines.append(f"{name}: {_nothing_accepted(name, step)}")
        reasons = sorted(step["problems"].items(), key=lambda entry: (-entry[1], entry[0]))
        if reasons:
            lines.append(f"{name}, failed: {', '.join(f'{reason} ({count})' for reason, count in reasons)}")
    if server.get("end_status") not in (None, 0, -signal.SIGTERM):  # by which others end when they are asked to
        lines.append(f"The server ended with status {server['end_status']}: its log, beside the result, may say why.")
    return lines


def _nothing_accepted(name: str, step: Step) -> str:
    """Say that a step has no latencies, and what to do: by what became of most of its requests."""
    no_p99 = "so there is no p99 to judge"
    if not step["requests"]:
        return f"no request was sent, {no_p99}; make the step longer with --{'soak' if name == 'soak' else 'seconds'}"
    counts = {"refused": step["refused"]["count"], "failed": step["failed"], "hung": step["hung"]}
    less = "send fewer with a smaller --overload, or " if name == "overload" else ""
    advice = {
        "refused": f"{less}give the server a longer queue: {QUEUE}",
        "failed": "the server's log may say why",
        "hung": f"{less}wait longer with --deadline",
    }
    counted = ", ".join(f"{count} {what}" for what, count in counts.items())
    return (
        f"none of {step['requests']:,} requests was accepted ({counted}), {no_p99}; "
        + advice[max(counts, key=lambda what: counts[what])]
    )


def outcome_table(server: Step) -> str:
    """Write what became of the requests of every step.

    >>> print(outcome_table(server))
    """
    rows: list[Row] = []
    for name, step in _steps(server):
        accepted, refused, scores = step["accepted"], step["refused"], step["scores"]
        different = scores["different"] + scores["unreadable"]
        rows.append(
            (
                *(name, f"{step['requests']:,}", f"{accepted['count']:,}"),
                *(_or_dash(accepted[share]) for share in ("p50", "p90", "p99", "max")),
                *(f"{refused['count']:,}", *(_or_dash(refused[share]) for share in ("p50", "p99", "max"))),
                *(str(step["failed"]), str(step["hung"])),
                f"{different:,} (by {scores['max_difference']:.2g})" if different else "0",
            )
        )
    columns = ("step", "sent", "accepted", "p50 ms", "p90", "p99", "max", "refused", "p50 ms", "p99", "max")
    return markdown((*columns, "failed", "hung", "other scores"), rows)


def resource_table(server: Step) -> str:
    """Write what every step took, of the server's process and of the generator.

    >>> print(resource_table(server))
    """
    rows: list[Row] = []
    for name, step in _steps(server):
        watched: Step | None = step["server"]
        took: Row = ("-",) * 6
        if watched:
            memory, growth, files = (
                watched[what] for what in ("resident_bytes", "resident_bytes_per_minute", "descriptors")
            )
            took = (
                number(watched["cpu_seconds"]),
                *(size(memory[when]) for when in ("first", "last", "most")),
                "-" if growth is None else f"{growth / 1e6:+.2f} MB",
                f"{files['first']}, {files['last']}, {files['most']}",
            )
        rows.append((name, *took, number(step["generator_cpu_seconds"]), _or_dash(step["late_ms"]["p99"])))
    columns = ("step", "server: CPU s", "memory first", "last", "most", "a minute", "files first, last, most")
    return markdown((*columns, "generator: CPU s", "late, p99 ms"), rows)


def latency_table(server: Step) -> str:
    """Write the latencies of accepted requests by their number of pairs.

    >>> print(latency_table(server))

    The last column says how far the median is above the scorer's.
    """
    rows: list[Row] = []
    for name, step in _steps(server):
        for pairs, found in step["accepted_by_pairs"].items():
            above = step.get("overhead_ms_by_pairs", {}).get(pairs, {})
            latencies = [found[share] for share in ("sent", "count", "p50", "p90", "p99", "max")]
            rows.append((name, pairs, *map(_or_dash, latencies), _or_dash(above.get("p50"))))
    columns = ("step", "pairs", "sent", "accepted", "p50 ms", "p90 ms", "p99 ms", "max ms")
    return markdown((*columns, "p50 above Scorer.score, ms"), rows)


def bound_table(server: Step) -> str:
    """Write the bounds, and whether each was held.

    >>> print(bound_table(server))
    """
    rows = [
        (one["what"], _or_dash(one["value"]), one["bound"], "yes" if one["holds"] else "NO") for one in server["bounds"]
    ]
    return markdown(("what", "measured", "bound", "held"), rows)


def _steps(server: Step) -> list[tuple[str, Step]]:
    return [(name, server[name]) for name in STEPS if name in server]


def _or_dash(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else number(value)
