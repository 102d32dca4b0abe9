"""Measures one server step by step: unloaded, saturated, overloaded and, if asked for, for long.

Where the server is compared with `Scorer.score`, which runs in a process of its own, the two take turns. While one
works the other one is idle: the scorer is asked only when the server has answered all, and the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cappy_bench.load.bodies import Dialect
from cappy_bench.load.driving import Exchange, Room, Target, closed_loop, exchange, open_loop, poisson_times
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.load.mix import Load
from cappy_bench.load.offline import Offline
from cappy_bench.load.outcomes import ANSWERED, compare_scores, count_outcomes, latencies
from cappy_bench.load.process_watch import Sample, describe_samples, watch

PAUSE_SECONDS = 0.1
"""Between the server and the scorer. ONNX Runtime's threads look out for more work for some time after a run, and take
the cores meanwhile: with 2 ms between two single pairs both sides took 38 ms, with 50 ms 13, alone 10 to 13."""
BLOCK_SECONDS = 1.0
ROUND_SECONDS = 5.0
SOAK_LOAD = 0.7
WARM_UP_REQUESTS = 32
Say = Callable[[str], object]
Result = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """The load, and what it is held against: all that is the same for every server."""

    options: LoadOptions
    load: Load
    offline: Offline
    offline_tokens_per_second: float
    say: Say


@dataclass(frozen=True)
class Server:
    """A server under load: how it is asked, what it is sent, and its process (None: not ours to watch).

    At saturation there are as many requests under way as `connections` and its `rooms` allow.
    """

    name: str
    target: Target
    dialect: Dialect
    connections: int
    rooms: Sequence[Room]
    pid: int | None


async def measure_server(server: Server, asked: Asked, *, beside_offline: bool) -> Result:
    """Take a server through all steps; `beside_offline` says whether the scorer takes turns with it.

    >>> (await measure_server(server, asked, beside_offline=True))["overload"]["hung"]
    0
    """
    options = asked.options
    warm_up = range(min(WARM_UP_REQUESTS, len(asked.load.requests)))
    await closed_loop(server.target, warm_up, connections=1)
    result: Result = {"unloaded": await _unloaded(server, asked, beside_offline=beside_offline)}
    asked.say(f"{server.name}: unloaded, p50 {result['unloaded']['accepted']['p50']} ms")
    result["saturation"] = await saturation(server, asked, beside_offline=beside_offline)
    capacity = result["saturation"]["requests_per_second"]
    asked.say(f"{server.name}: saturated, {capacity:.2f} requests/s")
    if capacity:
        result["overload"] = await random_load(
            server, asked, rate=options.overload * capacity, seconds=options.seconds, seed=options.seed
        )
        asked.say(f"{server.name}: overloaded, {_shares(result['overload'])}")
    if capacity and options.soak:
        result["soak"] = await random_load(
            server, asked, rate=SOAK_LOAD * capacity, seconds=60 * options.soak, seed=options.seed + 1
        )
        asked.say(f"{server.name}: soaked, {_shares(result['soak'])}")
    return result


async def _unloaded(server: Server, asked: Asked, *, beside_offline: bool) -> Result:
    """Send one request at a time; after about a second of them the scorer gets the same ones, one at a time.

    `overhead_ms` are the differences between the two, request by request.
    """
    found: list[Exchange] = []
    alone: list[float] = []
    until = time.perf_counter() + asked.options.seconds
    places = itertools.cycle(range(len(asked.load.requests)))
    async with _watched(server, asked.options.seconds) as usage:
        while time.perf_counter() < until or not found:
            block: list[int] = []
            end = time.perf_counter() + min(BLOCK_SECONDS, asked.options.seconds / 4)
            while time.perf_counter() < end or not block:
                block.append(next(places))
                found.append(await exchange(server.target, block[-1]))
            if beside_offline:
                await asyncio.sleep(PAUSE_SECONDS)
                alone += await asyncio.to_thread(asked.offline.each, block)
                await asyncio.sleep(PAUSE_SECONDS)
    result = _outcome(server, asked, found) | usage
    if beside_offline:
        sizes = np.array([asked.load.sizes[one.place] for one in found])
        more = np.array([one.seconds for one in found]) - np.array(alone)
        is_answered = np.array([one.status == ANSWERED for one in found])
        result["scorer"] = latencies(alone)
        result["overhead_ms"] = latencies(more[is_answered])
        result["overhead_ms_by_pairs"] = {
            str(size): latencies(more[is_answered & (sizes == size)]) for size in sorted(set(sizes.tolist()))
        }
    return result


async def saturation(server: Server, asked: Asked, *, beside_offline: bool) -> Result:
    """Keep the server's queue full, in rounds of some seconds.

    In every round the scorer gets the pairs of all its requests in one call. A round ends when all is answered, so that
    the server is idle then. `ratio` is the server's throughput divided by the scorer's: of each round, and their
    median.

        >>> (await saturation(server, asked, beside_offline=True))["ratio"]["median"]
        0.97
    """
    load, options = asked.load, asked.options
    found: list[Exchange] = []
    last: list[Exchange]
    rounds: list[dict[str, float]] = []
    places = itertools.cycle(range(len(load.requests)))
    goal = asked.offline_tokens_per_second * min(ROUND_SECONDS, options.seconds / 6)
    until = time.perf_counter() + options.seconds
    async with _watched(server, options.seconds) as usage:
        while not rounds or time.perf_counter() < until:
            chunk, last = _take(places, load, goal), []
            seconds: dict[str, float] = {}
            turns = ["server", "scorer"] if beside_offline else ["server"]
            for turn in turns if len(rounds) % 2 == 0 else reversed(turns):
                await asyncio.sleep(PAUSE_SECONDS)
                if turn == "scorer":
                    seconds[turn] = await asyncio.to_thread(asked.offline.all, chunk)
                    continue
                begin = time.perf_counter()
                last = await closed_loop(server.target, chunk, connections=server.connections, rooms=server.rooms)
                seconds[turn] = time.perf_counter() - begin
            found += last
            done = [one.place for one in last if one.status == ANSWERED]
            rounds.append({"tokens": int(load.tokens[done].sum()), "requests": len(done), **seconds})
            if len(done) < len(chunk):  # some failed or hung: there is no capacity to measure
                rounds[-1].pop("scorer", None)  # it scored them all, so the two did not do the same
                break
    return _outcome(server, asked, found) | _throughput(rounds, asked) | usage


async def random_load(server: Server, asked: Asked, *, rate: float, seconds: float, seed: int) -> Result:
    """Send requests at random times, `rate` a second on average, whatever the server answers.

    >>> (await random_load(server, asked, rate=20.0, seconds=60.0, seed=0))["refused"]["count"]
    611
    """
    times = poisson_times(rate, seconds, seed=seed)
    async with _watched(server, seconds) as usage:
        found = await open_loop(server.target, itertools.cycle(range(len(asked.load.requests))), times)
        await asyncio.sleep(min(5.0, seconds / 10))
    tokens = int(sum(asked.load.tokens[one.place] for one in found if one.status == ANSWERED))
    end = max((one.ended for one in found), default=0.0)
    took = end - min((one.due for one in found), default=0.0)
    return {
        "seconds": seconds,
        "rate": round(rate, 3),
        "tokens_per_second": round(tokens / took, 1) if took else None,
        **_outcome(server, asked, found),
        **usage,
    }


@contextlib.asynccontextmanager
async def _watched(server: Server, seconds: float) -> AsyncIterator[Result]:
    """Watch the server's process, and our own CPU time, while a step runs.

    The step takes some `seconds`. In the end, the dict holds the figures.
    """
    usage: Result = {}
    samples: list[Sample] = []
    began = time.process_time()
    every = min(5.0, max(0.05, seconds / 60))
    task = None if server.pid is None else asyncio.create_task(watch(server.pid, samples, every_seconds=every))
    try:
        await asyncio.sleep(0)  # the first sample is taken before the first request
        yield usage
    finally:
        took = time.process_time() - began
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        usage |= {"server": describe_samples(samples), "generator_cpu_seconds": round(took, 2)}


def _take(places: itertools.cycle[int], load: Load, tokens: float) -> list[int]:
    """Take requests of about so many tokens, none twice."""
    chunk: list[int] = []
    while len(chunk) < len(load.requests) and (not chunk or load.tokens[chunk].sum() < tokens):
        chunk.append(next(places))
    return chunk


def _throughput(rounds: Sequence[dict[str, float]], asked: Asked) -> Result:
    """Capacity in requests is that of the mean request: the rounds have large and small ones by chance."""
    seconds, tokens = sum(one["server"] for one in rounds), sum(one["tokens"] for one in rounds)
    mean_tokens = float(asked.load.tokens.mean())
    result: Result = {
        "rounds": [{name: round(value, 4) for name, value in one.items()} for one in rounds],
        "tokens_per_second": round(tokens / seconds, 1),
        "requests_per_second": round(tokens / seconds / mean_tokens, 3),
    }
    compared = [one for one in rounds if "scorer" in one and one["tokens"]]
    if compared:
        ratios = [one["scorer"] / one["server"] for one in compared]
        scorer = sum(one["tokens"] for one in compared) / sum(one["scorer"] for one in compared)
        result["scorer_tokens_per_second"] = round(scorer, 1)
        result["ratio"] = {
            "median": round(float(np.median(ratios)), 4),
            "least": round(min(ratios), 4),
            "most": round(max(ratios), 4),
        }
    return result


def _outcome(server: Server, asked: Asked, found: Sequence[Exchange]) -> Result:
    return {
        **count_outcomes(found, asked.load.sizes),
        "scores": compare_scores(found, asked.offline.expected, server.dialect.scores),
    }


def _shares(step: Result) -> str:
    return (
        f"{step['accepted']['count']} accepted, {step['refused']['count']} refused, "
        f"{step['failed']} failed, {step['hung']} hung"
    )
