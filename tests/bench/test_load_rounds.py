"""Rates and throughput of the steps of `cappy bench serve`, against a client that answers from this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from cappy_bench.load import load_steps
from cappy_bench.load.bodies import NATIVE
from cappy_bench.load.bounds import judge
from cappy_bench.load.connections import Answer, Client
from cappy_bench.load.driving import Exchange, Target
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.load.load_steps import Asked, Server, measure_server, random_load, saturation
from cappy_bench.load.load_tables import latency_table, load_tables, outcome_table, resource_table
from cappy_bench.load.mix import Load
from cappy_bench.load.offline import Offline
from tests.support.fake_tools import row_of

TOKENS = [10, 30, 20]


class FakeScorer:
    """A scorer that would take 10 seconds for the first that it gets, then 20, then 90, and 10 again."""

    def __init__(self, load: Load, turns: list[str]) -> None:
        self.turns = turns
        self.expected = [np.zeros(size) for size in load.sizes]
        self.seconds = itertools.cycle((10.0, 20.0, 90.0))

    def each(self, places: Sequence[int]) -> list[float]:
        return [0.0] * len(places)

    def all(self, places: Sequence[int]) -> float:
        self.turns.append("scorer")
        return next(self.seconds)


class FakeClient:
    """Answers after 20 ms with the statuses that are given, in turn. `asked` and `answered` are times."""

    def __init__(self, turns: list[str], *statuses: int) -> None:
        self.turns, self.statuses, self.count = turns, statuses, 0
        self.asked: list[float] = []
        self.answered: list[float] = []

    async def ask(self, request: bytes, deadline_seconds: float) -> Answer:
        self.count += 1
        self.turns.append("server")
        self.asked.append(time.perf_counter())
        status = self.statuses[self.count % len(self.statuses)]
        await asyncio.sleep(0.02)
        body = json.dumps({"results": [{"index": 0, "score": 0.0}]}).encode()
        self.answered.append(time.perf_counter())
        return Answer(status, body, self.answered[-1])


def a_server(*statuses: int, **options: Any) -> tuple[Server, Asked]:
    load = Load(((("a", "b"),), (("c", "d"),), (("e", "f"),)), np.array(TOKENS), "made up")
    turns: list[str] = []
    offline = cast(Offline, FakeScorer(load, turns))
    asked = Asked(LoadOptions(requests=3, **options), load, offline, 1000.0, lambda line: None)
    target = Target(cast(Client, FakeClient(turns, *statuses)), [b""] * 3, 5.0)
    return Server("a fake", target, NATIVE, connections=1, rooms=(), pid=None), asked


@pytest.mark.slow
def test_saturation_is_tokens_over_the_servers_seconds_and_its_ratio_the_scorers_seconds_over_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_steps, "PAUSE_SECONDS", 0.0)
    found = asyncio.run(saturation(*a_server(200, seconds=2.0), beside_offline=True))
    rounds = found["rounds"]
    assert len(rounds) > 2
    tokens, seconds = sum(one["tokens"] for one in rounds), sum(one["server"] for one in rounds)
    assert found["tokens_per_second"] == pytest.approx(tokens / seconds, rel=0.01)
    assert found["requests_per_second"] == pytest.approx(tokens / seconds / statistics.mean(TOKENS), rel=0.01)
    assert [one["scorer"] for one in rounds[:3]] == [10, 20, 90]
    assert {one["requests"] for one in rounds} == {3}, "none twice in a round"
    scored = sum(one["scorer"] for one in rounds)
    assert found["scorer_tokens_per_second"] == pytest.approx(tokens / scored, abs=0.1)
    ratios = sorted(one["scorer"] / one["server"] for one in rounds)
    shown = [found["ratio"][name] for name in ("least", "median", "most")]
    assert shown == pytest.approx([ratios[0], statistics.median(ratios), ratios[-1]], rel=0.01)


@pytest.mark.slow
def test_the_server_and_the_scorer_take_turns_in_the_other_order_in_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that a drift of the machine meets both alike."""
    monkeypatch.setattr(load_steps, "PAUSE_SECONDS", 0.0)
    server, asked = a_server(200, seconds=2.0)
    found = asyncio.run(saturation(server, asked, beside_offline=True))
    count = len(found["rounds"])
    assert count > 2
    orders = [["server"] * 3 + ["scorer"], ["scorer"] + ["server"] * 3]
    assert cast(FakeClient, server.target.client).turns == [name for at in range(count) for name in orders[at % 2]]


@pytest.mark.slow
def test_a_pause_between_the_two_is_no_part_of_the_servers_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_steps, "PAUSE_SECONDS", 0.5)
    server, asked = a_server(200, seconds=0.5)
    (one,) = asyncio.run(saturation(server, asked, beside_offline=True))["rounds"]
    client = cast(FakeClient, server.target.client)
    assert one["server"] < client.answered[-1] - client.asked[0] + 0.5


@pytest.mark.slow
def test_overhead_is_that_of_answered_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is fast, and would make it look small."""
    monkeypatch.setattr(load_steps, "PAUSE_SECONDS", 0.0)
    found = asyncio.run(measure_server(*a_server(200, 429, seconds=0.5), beside_offline=True))["unloaded"]
    assert 0 < found["accepted"]["count"] < found["requests"] == found["scorer"]["count"]
    for counted in (found["overhead_ms"], found["overhead_ms_by_pairs"]["1"]):
        assert counted["count"] == found["accepted"]["count"]


def test_a_round_in_which_requests_failed_is_not_compared_with_the_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer had all of them: a server that fails fast would look as fast as one that answers."""
    monkeypatch.setattr(load_steps, "PAUSE_SECONDS", 0.0)
    found = asyncio.run(saturation(*a_server(200, 500, 200, seconds=0.5), beside_offline=True))
    assert found["failed"] > 0
    assert "ratio" not in found
    (one,) = found["rounds"]
    assert (one["tokens"], one["requests"]) == (30 + 20, 2)
    expected = 50 / statistics.mean(TOKENS) / one["server"]
    assert found["requests_per_second"] == pytest.approx(expected, rel=0.01), "of the mean size, by the tokens"


def test_rounds_before_one_that_failed_are_compared_with_the_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_steps, "PAUSE_SECONDS", 0.0)
    found = asyncio.run(saturation(*a_server(500, *[200] * 7, seconds=5.0), beside_offline=True))
    assert [one.get("scorer") for one in found["rounds"]] == [10, 20, None]
    assert found["scorer_tokens_per_second"] == 2 * sum(TOKENS) / (10 + 20)
    ratios = [one["scorer"] / one["server"] for one in found["rounds"][:2]]
    assert [found["ratio"]["least"], found["ratio"]["most"]] == pytest.approx(sorted(ratios), rel=0.01)


@pytest.mark.slow
def test_the_last_steps_have_their_share_of_the_capacity_and_their_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[tuple[float, float, int]] = []

    async def remember(server: Server, asked: Asked, *, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        asked_for.append((rate, seconds, seed))
        return {"accepted": {"count": 0}, "refused": {"count": 0}, "failed": 0, "hung": 0}

    monkeypatch.setattr(load_steps, "random_load", remember)
    server, asked = a_server(200, seconds=0.5, overload=3.0, soak=2.0, seed=7)
    found = asyncio.run(measure_server(server, asked, beside_offline=True))
    capacity = found["saturation"]["requests_per_second"]
    assert asked_for == [(3.0 * capacity, 0.5, 7), (0.7 * capacity, 120.0, 8)]
    counted = found["unloaded"]["requests"] + found["saturation"]["requests"]
    assert cast(FakeClient, server.target.client).count == counted + 3, "the warm-up's are in no step"


@pytest.mark.slow
@pytest.mark.parametrize(("status", "is_answered"), [(200, True), (429, False), (500, False)])
def test_throughput_under_load_is_that_of_answered_requests(status: int, *, is_answered: bool) -> None:
    found = asyncio.run(random_load(*a_server(status, seconds=0.5), rate=60.0, seconds=0.5, seed=0))
    assert found["requests"] > 10
    assert (found["tokens_per_second"] > 0) == is_answered
    if is_answered:
        assert found["tokens_per_second"] == pytest.approx(60 * statistics.mean(TOKENS), rel=0.5)


def test_throughput_under_load_is_from_the_first_that_was_due_to_the_last_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answered(*_: object) -> list[Exchange]:
        return [
            Exchange(0, 100.0, 100.5, 101.0, 200),
            Exchange(1, 101.0, 101.5, 104.0, 200),
            Exchange(2, 102.0, 102.0, 102.5, 429),
        ]

    monkeypatch.setattr(load_steps, "open_loop", answered)
    found = asyncio.run(random_load(*a_server(200, seconds=0.5), rate=60.0, seconds=0.1, seed=0))
    assert found["tokens_per_second"] == (10 + 30) / 4


NO_P99 = "so there is no p99 to judge; "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "rate", "told"),
    [
        (429, 60.0, f"refused, 0 failed, 0 hung), {NO_P99}send fewer with a smaller --overload, or give the server a "),
        (503, 60.0, f"failed, 0 hung), {NO_P99}the server's log may say why"),
        (200, 1e-6, f"no request was sent, {NO_P99}make the step longer with --seconds"),
    ],
)
def test_a_step_in_which_nothing_was_accepted_says_so_and_what_to_do(status: int, rate: float, told: str) -> None:
    accepted = asyncio.run(random_load(*a_server(200, seconds=0.5), rate=60.0, seconds=0.5, seed=0))
    none = asyncio.run(random_load(*a_server(status, seconds=0.5), rate=rate, seconds=0.5, seed=0))
    server = {"unloaded": accepted, "saturation": {**accepted, "requests_per_second": 60.0}, "overload": none}
    broken = [verdict["what"] for verdict in judge(server, batch_ms=10.0) if not verdict["holds"]]
    assert "overload: accepted requests" in broken
    described = {"name": "a fake", "status": "ok", "connections": 1, "ready_seconds": None}
    load = {"requests": 3, "requests_by_pairs": {"1": 3}, "tokens": 60, "texts": "made up"}
    offline = {"tokens_per_second": 1000.0, "pairs_per_second": 50.0}
    shown = load_tables({"load": load, "offline": offline, "servers": [{**described, **server}]})
    (line,) = [line for line in shown.splitlines() if "no p99" in line]
    assert line.startswith("overload: ")
    assert told in line


def test_what_stands_above_the_tables_is_the_most_of_the_server_and_of_the_scorer() -> None:
    found = asyncio.run(random_load(*a_server(200, seconds=0.5), rate=60.0, seconds=0.1, seed=0))
    fastest = {**found, "tokens_per_second": 4321.0, "requests_per_second": 56.0}
    server = {"name": "a fake", "status": "ok", "connections": 7, "ready_seconds": 1.25, "setting": "by hand"}
    load = {"requests": 3, "requests_by_pairs": {"1": 2, "4": 1}, "tokens": 6000, "texts": "made up"}
    offline = {"tokens_per_second": 8765.0, "pairs_per_second": 98.0}
    steps = {"unloaded": found, "saturation": fastest}
    first, heading, *_ = load_tables({"load": load, "offline": offline, "servers": [{**server, **steps}]}).split("\n\n")
    alone = "Scorer.score alone: 8,765 tokens/s, 98 pairs/s."
    assert first == f"3 requests of 1, 4 pairs, 6,000 tokens (made up). {alone}"
    assert heading == "a fake (by hand), 7 connections: 4,321 tokens/s, 56 requests/s; ready after 1.25 s"


def test_the_tables_show_each_figure_in_its_column() -> None:
    step = {
        "requests": 1001,
        "accepted": {"count": 900, "p50": 1.5, "p90": 2.5, "p99": 3.5, "max": 4.5},
        "accepted_by_pairs": {"16": {"sent": 55, "count": 44, "p50": 5.5, "p90": 6.5, "p99": 7.5, "max": 8.5}},
        "refused": {"count": 101, "p50": 0.5, "p90": 0.6, "p99": 0.75, "max": 0.875},
        "failed": 6,
        "hung": 7,
        "scores": {"different": 2, "unreadable": 1, "max_difference": 0.25},
        "late_ms": {"p99": 0.125},
        "server": {
            "cpu_seconds": 12.5,
            "resident_bytes": {"first": 10**6, "last": 2 * 10**6, "most": 3 * 10**6},
            "resident_bytes_per_minute": 250_000,
            "descriptors": {"first": 4, "last": 5, "most": 6},
        },
        "generator_cpu_seconds": 1.25,
        "overhead_ms_by_pairs": {"16": {"p50": 0.375}},
    }
    shown = row_of(outcome_table({"overload": step}), "overload")
    assert shown[1:11] == ["1,001", "900", "1.5", "2.5", "3.5", "4.5", "101", "0.5", "0.75", "0.875"]
    assert shown[11:] == ["6", "7", "3 (by 0.25)"]
    row = row_of(latency_table({"overload": step}), "overload")
    assert row[1:] == ["16", "55", "44", "5.5", "6.5", "7.5", "8.5", "0.375"]
    took = row_of(resource_table({"overload": step}), "overload")
    assert took[1:] == ["12.5", "1 MB", "2 MB", "3 MB", "+0.25 MB", "4, 5, 6", "1.25", "0.125"]
