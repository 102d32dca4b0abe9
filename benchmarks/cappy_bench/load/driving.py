"""Sends requests to a server, in an open or a closed loop.

Each answer, or problem, is noted with its time. Nothing is judged here: bodies are kept as they came, for later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cappy_bench.load.connections import BadAnswer, Client

Times = npt.NDArray[np.float64]

REFUSED = 429
AGAIN_SECONDS = 0.05
"""After how long a closed loop sends a refused request again."""
HUNG = "no answer within the deadline"


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and what came back: `place` says which request it was.

    `due`, `sent` and `ended` are times (`time.perf_counter`): when the request was to be sent, when it was, and when
    the last byte of the answer came. Without an answer `status` is 0, and `problem` says why.
    """

    place: int
    due: float
    sent: float
    ended: float
    status: int
    body: bytes = b""
    problem: str = ""

    @property
    def seconds(self) -> float:
        """Its latency, from the time at which it was to be sent."""
        return self.ended - self.due


@dataclass(frozen=True)
class Target:
    """Holds a client of the server, and the bytes of every request of the load.

    A request without an answer after `deadline_seconds` counts as hung.
    """

    client: Client
    requests: Sequence[bytes]
    deadline_seconds: float


async def exchange(target: Target, place: int, *, due: float | None = None) -> Exchange:
    """Send one request, and note what came back.

    >>> (await exchange(target, 0)).status
    200
    """
    sent = time.perf_counter()
    begin = sent if due is None else due
    try:
        answer = await target.client.ask(target.requests[place], target.deadline_seconds)
    except TimeoutError:
        return Exchange(place, begin, sent, time.perf_counter(), 0, problem=HUNG)
    except (BadAnswer, OSError) as error:
        return Exchange(place, begin, sent, time.perf_counter(), 0, problem=str(error) or type(error).__name__)
    return Exchange(place, begin, sent, answer.ended, answer.status, answer.body)


def poisson_times(rate: float, seconds: float, *, seed: int) -> Times:
    """Draw the arrivals of a Poisson process: seconds from its start, ascending, on average `rate` a second.

    The gaps are independent and exponential, as those of many users who do not know of each other. The same arguments
    give the same times.

        >>> len(poisson_times(20.0, 60.0, seed=0))
        1196
    """
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, int(rate * seconds) + 1))
    while times[-1] < seconds:
        times = np.concatenate([times, times[-1] + np.cumsum(random.exponential(1 / rate, len(times)))])
    return np.asarray(times[times < seconds])


async def open_loop(target: Target, places: Iterable[int], times: Times) -> list[Exchange]:
    """Send each request at its time, whether or not earlier ones were answered.

    Latencies count from that time. So a server that stands still for a second is a second late for all that was to be
    sent meanwhile, and not for one request alone, which is how a closed loop sees it (coordinated omission).

        >>> await open_loop(target, [0, 1, 2], poisson_times(20.0, 60.0, seed=0))
    """
    begin, under_way = time.perf_counter(), []
    for place, offset in zip(places, times.tolist(), strict=False):
        due = begin + offset
        wait = due - time.perf_counter()
        await asyncio.sleep(max(0.0, wait))  # also when late: what was sent before must go on
        while (wait := due - time.perf_counter()) > 0:  # a timer may ring early
            await asyncio.sleep(max(wait, 0.001))
        under_way.append(asyncio.create_task(exchange(target, place, due=due)))
    return list(await asyncio.gather(*under_way))


@dataclass(frozen=True)
class Room:
    """What may be under way at a time: `most` of what each request takes, such as the tokens of a queue.

    A request that takes more than that is sent alone.
    """

    takes: Sequence[int]
    most: int


async def closed_loop(
    target: Target, places: Iterable[int], *, connections: int, rooms: Sequence[Room] = ()
) -> list[Exchange]:
    """Send requests over some connections.

    Each connection sends the next request as soon as its last was answered. With `rooms` a request is sent when it fits
    into all of them; requests are sent in order. A refused request is sent again a little later. No more are sent once
    one was refused until its deadline.

        >>> await closed_loop(target, range(100), connections=8, rooms=[Room(load.sizes, 1024)])
    """
    found: list[Exchange] = []
    rest = iter(places)
    under_way: list[int] = []
    in_order, has_ended, is_over = asyncio.Lock(), asyncio.Event(), asyncio.Event()

    def fits(place: int) -> bool:
        return not under_way or all(
            room.takes[place] + sum(room.takes[one] for one in under_way) <= room.most for room in rooms
        )

    async def enter() -> int | None:
        async with in_order:
            place = None if is_over.is_set() else next(rest, None)
            while place is not None and not fits(place):
                has_ended.clear()
                await has_ended.wait()
            if place is not None:
                under_way.append(place)
            return place

    async def one_by_one() -> None:
        while (place := await enter()) is not None:
            found.append(last := await exchange(target, place))
            deadline = last.sent + target.deadline_seconds
            while last.status == REFUSED and time.perf_counter() < deadline:
                await asyncio.sleep(AGAIN_SECONDS)
                found.append(last := await exchange(target, place))
            if last.status == REFUSED:
                is_over.set()
            under_way.remove(place)
            has_ended.set()

    await asyncio.gather(*(one_by_one() for _ in range(connections)))
    return found
