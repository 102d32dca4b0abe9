"""Clients that go away in the worst moment: when their scores are there, and when the server ends."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from starlette.types import Message

from cappy_engine.serving.http.bodies import ClientGone, cancelled_when_gone

GONE: Message = {"type": "http.disconnect"}


def test_a_client_that_goes_in_the_moment_of_its_scores_stops_nothing_that_comes_after() -> None:
    """Else its answer would be cut off, and neither be counted nor told in the log."""

    async def run() -> None:
        are_scored = asyncio.Event()

        async def receive() -> Message:
            are_scored.set()
            return GONE

        async with cancelled_when_gone(receive):
            await are_scored.wait()
        for _ in range(5):  # in which a late cancel would come
            await asyncio.sleep(0)

    asyncio.run(run())


def test_a_client_that_goes_ends_its_request_and_no_other_work_of_the_task() -> None:
    async def run() -> None:
        async def receive() -> Message:
            return GONE

        task = cast("asyncio.Task[None]", asyncio.current_task())
        with pytest.raises(ClientGone):
            async with cancelled_when_gone(receive):
                await asyncio.Event().wait()
        assert not task.cancelling()

    asyncio.run(run())


def test_a_server_that_ends_is_heard_also_where_the_client_goes_in_the_same_moment() -> None:
    async def run() -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())

        async def receive() -> Message:
            asyncio.get_running_loop().call_soon(task.cancel)  # before it is known that the client has gone
            return GONE

        async with cancelled_when_gone(receive):
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())


def test_nobody_listens_to_a_client_any_more_when_its_request_is_scored() -> None:
    async def run() -> None:
        listens = asyncio.Event()

        async def receive() -> Message:
            listens.set()
            await asyncio.Event().wait()
            return GONE

        async with cancelled_when_gone(receive):
            await listens.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
