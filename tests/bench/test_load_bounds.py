"""A server's process is watched from outside, and its steps are held against bounds."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.load.bounds import STEPS, judge
from cappy_bench.load.load_tables import bound_table
from cappy_bench.load.process_watch import Sample, describe_samples, sample, slope, watch

# The server's process


def test_a_leak_is_the_slope_of_the_memory_and_what_came_before_it_is_not() -> None:
    def memory(second: int) -> int:
        return 10**8 + (5_000_000 * second if second < 10 else 50_000_000 + 1000 * second)

    samples = [Sample(float(second), memory(second), 8, second / 2) for second in range(60)]
    assert slope(samples) == pytest.approx(60_000)
    assert slope(samples, warm_up=0.0) != pytest.approx(60_000, rel=0.5)
    assert slope(samples[:2]) is None
    assert describe_samples([]) is None


def test_what_a_process_took_is_told_from_its_first_sample_to_its_last() -> None:
    samples = [Sample(100.0, 500, 7, 20.0), Sample(101.0, 900, 30, 21.0), Sample(102.5, 600, 9, 23.5)]
    found = describe_samples(samples)
    assert found is not None
    assert (found["samples"], found["seconds"], found["cpu_seconds"]) == (3, 2.5, 3.5)
    assert found["resident_bytes"] == {"first": 500, "last": 600, "most": 900}
    assert found["descriptors"] == {"first": 7, "last": 9, "most": 30}


def test_memory_is_what_is_resident_and_cpu_time_is_that_of_the_process_itself() -> None:
    def took() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    before, found, after = took(), sample(os.getpid()), took()
    assert found is not None
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before - 2 * tick <= found.cpu_seconds <= after + 2 * tick
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    assert found.resident_bytes == pytest.approx(1024 * int(told["VmRSS"].split()[0]), rel=0.1)


def test_a_process_is_watched_from_outside_until_it_ends() -> None:
    here = sample(os.getpid())
    assert here is not None
    assert here.resident_bytes > 2**20
    with open(os.devnull, "rb"):  # noqa: PTH123, it is to be open
        more = sample(os.getpid())
    assert more is not None
    assert more.descriptors == here.descriptors + 1

    async def watched() -> list[Sample]:
        process = await asyncio.create_subprocess_exec("sleep", "0.1")
        samples: list[Sample] = []
        _, *_ = await asyncio.gather(process.wait(), watch(process.pid, samples, every_seconds=0.02))
        return samples

    assert len(asyncio.run(watched())) >= 2


def test_a_process_that_crashed_has_no_memory_of_zero_bytes() -> None:
    """Its parent, who watches it, waits for it at the end of all steps only."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert sample(process.pid) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert sample(process.pid) is None


# Bounds


def a_step(**changes: Any) -> dict[str, Any]:
    memory = {"first": 10**8, "last": 10**8, "most": 10**8}
    return {
        "accepted": {"p99": 100.0},
        "refused": {"count": 0, "p99": None},
        "failed": 0,
        "hung": 0,
        "scores": {"different": 0, "unreadable": 0},
        "server": {
            "seconds": 60.0,
            "resident_bytes": memory,
            "resident_bytes_per_minute": 0,
            "descriptors": {"first": 9, "last": 9, "most": 30},
        },
        **changes,
    }


def a_server(**changes: Any) -> dict[str, Any]:
    return {
        "unloaded": a_step(overhead_ms={"p50": 0.7}),
        "saturation": a_step(ratio={"median": 0.97}),
        "overload": a_step(accepted={"p99": 510.0}, refused={"count": 50, "p99": 3.0}),
        "soak": a_step(),
        **changes,
    }


def broken(server: dict[str, Any]) -> list[str]:
    return [verdict["what"] for verdict in judge(server, batch_ms=20.0) if not verdict["holds"]]


def test_a_server_that_keeps_all_bounds_is_told_so() -> None:
    assert broken(a_server()) == []
    table = bound_table({"bounds": judge(a_server(), batch_ms=20.0)})
    assert "at most 520" in table
    assert "NO" not in table


def grown(seconds: float, last: int, per_minute: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "resident_bytes": {"first": 10**8, "last": last, "most": last},
        "resident_bytes_per_minute": per_minute,
        "descriptors": {"first": 9, "last": 200, "most": 200},
    }


@pytest.mark.parametrize(
    ("step", "changed", "told"),
    [
        ("unloaded", a_step(overhead_ms={"p50": 1.6}), ["unloaded: p50 of overhead, ms"]),
        ("unloaded", a_step(refused={"count": 1, "p99": 2.0}), ["unloaded: refused requests"]),
        ("saturation", a_step(ratio={"median": 0.94}), ["saturation: throughput, of Scorer.score"]),
        ("overload", a_step(accepted={"p99": 521.0}), ["overload: p99 of accepted requests, ms"]),
        ("overload", a_step(refused={"count": 9, "p99": 25.0}), ["overload: p99 of refusals, ms"]),
        ("overload", a_step(hung=1), ["all steps: hung requests"]),
        ("overload", a_step(failed=2), ["all steps: failed requests"]),
        (
            "soak",
            a_step(scores={"different": 1, "unreadable": 0}),
            ["all steps: answers with other scores than Scorer.score"],
        ),
        (
            "saturation",
            a_step(scores={"different": 0, "unreadable": 1}),
            ["all steps: answers with other scores than Scorer.score"],
        ),
        (
            "soak",
            a_step(server=grown(600.0, 101 * 10**6, 1_500_000)),
            ["soak: growth of memory, bytes a minute", "soak: more descriptors at the end"],
        ),
        (
            "overload",
            a_step(accepted={"p99": 510.0}, server=grown(60.0, 106 * 10**6, 0)),
            ["overload: growth of memory, of what it was", "overload: more descriptors at the end"],
        ),
        (
            "overload",
            a_step(accepted={"p99": 510.0}, server=grown(60.0, 102 * 10**6, 5_000_000)),
            ["overload: more descriptors at the end"],
        ),
    ],
)
def test_every_bound_that_is_broken_is_named(step: str, changed: dict[str, Any], told: list[str]) -> None:
    assert broken(a_server(**{step: changed})) == told


def watched(last: int = 10**8, more: int = 0, per_minute: int = 0, seconds: float = 60.0) -> dict[str, Any]:
    """A process that ends with so many bytes and so many more descriptors than it began with, and had more between."""
    return {
        "seconds": seconds,
        "resident_bytes": {"first": 10**8, "last": last, "most": 5 * 10**8},
        "resident_bytes_per_minute": per_minute,
        "descriptors": {"first": 9, "last": 9 + more, "most": 900},
    }


@pytest.mark.parametrize(
    ("what", "change", "kept", "broken_by"),
    [
        ("unloaded: p50 of overhead, ms", lambda value: {"overhead_ms": {"p50": value}}, 1.5, 1.501),
        ("saturation: throughput, of Scorer.score", lambda value: {"ratio": {"median": value}}, 0.95, 0.9499),
        ("overload: p99 of accepted requests, ms", lambda value: {"accepted": {"p99": value}}, 520.0, 520.001),
        ("overload: p99 of refusals, ms", lambda value: {"refused": {"count": 9, "p99": value}}, 20.0, 20.001),
        (
            "overload: growth of memory, of what it was",
            lambda value: {"server": watched(last=value)},
            105_000_000,
            105_010_000,
        ),
        ("overload: more descriptors at the end", lambda value: {"server": watched(more=value)}, 64, 65),
        (
            "soak: growth of memory, bytes a minute",
            lambda value: {"server": watched(per_minute=value)},
            1_000_000,
            1_000_001,
        ),
    ],
)
def test_a_bound_is_kept_at_its_value_and_broken_beyond(
    what: str, change: Callable[[float], dict[str, Any]], kept: float, broken_by: float
) -> None:
    step = what.partition(":")[0]
    for value, told in ((kept, []), (broken_by, [what])):
        server = a_server()
        server[step] |= change(value)
        assert broken(server) == told


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"failed": 1}, "all steps: failed requests"),
        ({"hung": 1}, "all steps: hung requests"),
        ({"scores": {"different": 1, "unreadable": 0}}, "all steps: answers with other scores than Scorer.score"),
        ({"scores": {"different": 0, "unreadable": 1}}, "all steps: answers with other scores than Scorer.score"),
    ],
    ids=["failed", "hung", "other scores", "no scores"],
)
def test_what_must_not_happen_must_not_in_any_step(change: dict[str, Any], told: str, step: str) -> None:
    server = a_server()
    server[step] |= change
    assert broken(server) == [told]


@pytest.mark.parametrize(
    ("step", "seconds", "told"),
    [
        ("overload", 29.9, []),
        ("overload", 30.0, ["overload: growth of memory, of what it was"]),
        ("overload", 119.9, ["overload: growth of memory, of what it was"]),
        ("overload", 120.0, ["overload: growth of memory, bytes a minute"]),
        ("soak", 29.9, []),
        ("soak", 30.0, ["soak: growth of memory, bytes a minute"]),
    ],
)
def test_growth_is_judged_by_what_the_time_can_show(step: str, seconds: float, told: list[str]) -> None:
    server = a_server(overload=a_step(accepted={"p99": 510.0}, server=None), soak=a_step(server=None))
    server[step]["server"] = watched(seconds=seconds)
    names = [verdict["what"] for verdict in judge(server, batch_ms=20.0)]
    assert [name for name in names if "growth" in name] == told
    assert (f"{step}: more descriptors at the end" in names) == bool(told)


def test_what_was_not_measured_has_no_verdict() -> None:
    server = a_server(overload=a_step(accepted={"p99": 50.0}, server=None))
    del server["soak"]
    names = [verdict["what"] for verdict in judge(server, batch_ms=20.0)]
    assert not [name for name in names if "memory" in name or "refusals" in name]


@pytest.mark.parametrize("step", ["unloaded", "saturation", "overload", "soak"])
def test_a_step_in_which_nothing_was_accepted_breaks_a_bound(step: str) -> None:
    server = a_server()
    server[step]["accepted"] = {"p99": None}
    assert broken(server) == [f"{step}: accepted requests"]
    (row,) = [line for line in bound_table({"bounds": judge(server, batch_ms=20.0)}).splitlines() if "NO" in line]
    assert "at least 1" in row
