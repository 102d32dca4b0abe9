"""Bodies that are read at once share the memory that they may fill."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.types import Message

from cappy_engine.errors import InvalidRequest, QueueFull
from cappy_engine.options import ScorerOptions
from cappy_engine.serving.http.bodies import BodyRoom, read_body
from cappy_engine.serving.http.endpoint import Gate
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service


def test_bodies_that_do_not_fit_together_are_refused_and_leave_room_again() -> None:
    room = BodyRoom(10)

    def parts(*sent: bytes, wait: bool = False) -> asyncio.Queue[Message]:
        queue: asyncio.Queue[Message] = asyncio.Queue()
        for number, part in enumerate(sent):
            queue.put_nowait({"type": "http.request", "body": part, "more_body": wait or number + 1 < len(sent)})
        return queue

    async def read(queue: asyncio.Queue[Message]) -> bytes:
        with room.of_one() as take:
            return await read_body(queue.get, None, max_bytes=8, seconds=5, take=take)

    async def run() -> None:
        slow = parts(b"123456", wait=True)
        first = asyncio.ensure_future(read(slow))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="bodies of 11 bytes are being read, and 10 may be"):
            await read(parts(b"abc", b"de"))
        assert await read(parts(b"abcd")) == b"abcd"
        with pytest.raises(InvalidRequest, match="more than 8 bytes"):
            await read(parts(b"abc", b"defghi"))
        slow.put_nowait({"type": "http.request", "body": b"7"})
        assert await first == b"1234567"
        assert room.held == 0

    asyncio.run(run())


def test_64_bodies_of_the_largest_size_may_arrive_at_once(bundle: Path) -> None:
    options = ServerOptions(max_body_bytes=1000)
    room = Gate(Service(bundle, ScorerOptions(), options, metrics=Metrics()), options, keys=None).bodies
    with room.of_one() as take, room.of_one() as take_one_more:
        take(64 * 1000)
        with pytest.raises(QueueFull, match="bodies of 64001 bytes are being read, and 64000 may be"):
            take_one_more(1)
