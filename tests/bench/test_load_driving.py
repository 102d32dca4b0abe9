"""Requests are sent when they are due, and what comes back is noted: with small servers of this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np
import pytest

from cappy_bench.load.connections import BadAnswer, Client, post, read_answer
from cappy_bench.load.driving import HUNG, Exchange, Room, Target, closed_loop, exchange, open_loop
from cappy_bench.load.outcomes import count_outcomes
from tests.support.http_answers import Handle, answer, answering

T = TypeVar("T")


def with_server(handle: Handle, ask: Callable[[Client, tuple[str, int]], Awaitable[T]]) -> T:
    """Run `ask` against a server on the loopback that answers by `handle`."""

    async def run() -> T:
        async with answering(handle) as address:
            client = Client(*address)
            try:
                return await ask(client, address)
            finally:
                client.close()

    return asyncio.run(run())


def target(client: Client, address: tuple[str, int], *bodies: bytes, deadline: float = 5.0) -> Target:
    return Target(client, [post(address, "/v1/rank", body) for body in bodies], deadline)


# Answers


def test_an_answer_is_read_from_any_pieces_and_only_when_it_is_complete() -> None:
    whole = answer(200, b'{"a": 1}', "Connection: close\r\n")
    for end in range(len(whole)):
        assert read_answer(whole[:end]) is None
    found = read_answer(whole)
    assert found is not None
    assert (found[0].status, found[0].body, found[1]) == (200, b'{"a": 1}', True)


@pytest.mark.parametrize(
    ("received", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "without content-length"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not an answer of HTTP/1.1"),
        (answer(200) + b"x", "more bytes than content-length says"),
    ],
)
def test_what_is_not_an_answer_is_said(received: bytes, problem: str) -> None:
    with pytest.raises(BadAnswer, match=problem):
        read_answer(received)


def test_connections_are_kept_and_there_are_as_many_as_requests_under_way() -> None:
    bodies: list[bytes] = []

    async def handle(body: bytes) -> bytes:
        bodies.append(body)
        await asyncio.sleep(0.01)
        return answer(200, body)

    async def ask(client: Client, address: tuple[str, int]) -> tuple[list[Exchange], int]:
        found = await closed_loop(target(client, address, b"a", b"b"), [0, 1] * 5, connections=2)
        return found, len(client._idle)

    found, kept = with_server(handle, ask)
    assert kept == 2
    assert sorted(bodies) == [b"a"] * 5 + [b"b"] * 5
    assert {(one.place, one.status, one.body) for one in found} == {(0, 200, b"a"), (1, 200, b"b")}


def test_a_kept_connection_that_the_server_closed_meanwhile_is_not_a_failed_request() -> None:
    async def handle(body: bytes) -> bytes:
        return answer(200) if body == b"first" else b""

    seen: list[bytes] = []

    async def closes_after_one(body: bytes) -> bytes:
        seen.append(body)
        return b"" if len(seen) == 2 else answer(200)

    async def ask(client: Client, address: tuple[str, int]) -> tuple[list[int], int]:
        asked = target(client, address, b"a")
        return [(await exchange(asked, 0)).status for _ in range(3)], client.sent_again

    assert with_server(closes_after_one, ask) == ([200, 200, 200], 1)

    async def ask_once(client: Client, address: tuple[str, int]) -> Exchange:
        return await exchange(target(client, address, b"other"), 0)

    found = with_server(handle, ask_once)
    assert (found.status, found.problem) == (0, "connection closed"), "a new connection that is closed is a failure"


def test_a_request_of_whose_answer_a_part_came_has_failed_and_is_not_sent_again() -> None:
    """Also over a connection that was kept: the server may have scored it."""
    whole = answer(200)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for found in (whole, whole[:-1]):
            await reader.readuntil(b"\r\n\r\na")
            writer.write(found)
        writer.close()

    async def run() -> list[Exchange]:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = server.sockets[0].getsockname()[:2]
            asked = target(Client(*address), address, b"a")
            return [await exchange(asked, 0) for _ in range(2)]

    assert [(one.status, one.problem) for one in asyncio.run(run())] == [(200, ""), (0, "connection closed")]


def test_a_server_that_is_not_there_is_a_problem_and_not_an_exception() -> None:
    async def ask(client: Client, address: tuple[str, int]) -> Exchange:
        return await exchange(target(Client("127.0.0.1", 1), address, b"a"), 0)

    async def never(body: bytes) -> bytes:
        raise AssertionError

    found = with_server(never, ask)
    assert found.status == 0
    assert "1" in found.problem


def test_a_request_without_an_answer_hangs_until_the_deadline_and_the_others_go_on() -> None:
    async def handle(body: bytes) -> bytes:
        if body == b"stuck":
            await asyncio.sleep(60)
        return answer(200)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        asked = target(client, address, b"fine", b"stuck", deadline=1.0)
        return await open_loop(asked, [0, 1, 0, 0], np.array([0.0, 0.01, 0.02, 0.03]))

    found = with_server(handle, ask)
    assert [one.problem for one in found] == ["", HUNG, "", ""]
    counted = count_outcomes(found, [1, 1])
    assert (counted["hung"], counted["failed"], counted["accepted"]["count"]) == (1, 0, 3)


# Loops


def test_a_server_that_stands_still_once_is_late_for_all_that_was_due_meanwhile() -> None:
    come: set[int] = set()

    async def handle(body: bytes) -> bytes:
        come.add(int(body))
        while int(body) >= 5 and 14 not in come:  # it stands still until the last request was sent
            await asyncio.sleep(0.001)
        return answer(200)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        bodies = [b"%d" % number for number in range(15)]
        return await open_loop(target(client, address, *bodies), range(15), np.linspace(0, 0.14, 15))

    found = with_server(handle, ask)
    assert {one.status for one in found} == {200}
    assert [one.due - found[0].due for one in found] == pytest.approx(np.linspace(0, 0.14, 15))
    assert all(one.seconds >= found[-1].due - one.due for one in found[5:])


def test_a_closed_loop_waits_for_a_server_that_stands_still_and_so_sees_one_slow_request() -> None:
    """That is coordinated omission, which an open loop does not have."""
    come: list[int] = []
    meanwhile: list[int] = []

    async def handle(body: bytes) -> bytes:
        come.append(len(come))
        if come[-1] == 5:
            await asyncio.sleep(0.2)
            meanwhile.append(come[-1] - 5)
        return answer(200)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        return await closed_loop(target(client, address, b"a"), [0] * 15, connections=1)

    found = with_server(handle, ask)
    assert (len(found), meanwhile) == (15, [0])
    assert found[5].seconds >= 0.2


def test_latency_counts_from_when_a_request_was_due_also_if_the_generator_was_late() -> None:
    async def handle(body: bytes) -> bytes:
        return answer(200)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.1)  # the generator itself stands still
        return await open_loop(target(client, address, b"a"), [0] * 3, np.array([0.0, 0.05, 0.08]))

    found = with_server(handle, ask)
    assert found[1].sent - found[1].due > 0.05
    assert all(one.seconds >= one.sent - one.due for one in found)
    assert count_outcomes(found, [1])["late_ms"]["max"] > 50


def test_a_closed_loop_sends_a_refused_request_again_and_notes_both() -> None:
    answers = [answer(429), answer(200)]

    async def handle(body: bytes) -> bytes:
        return answers.pop(0)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        return await closed_loop(target(client, address, b"a"), [0], connections=3)

    found = with_server(handle, ask)
    assert [one.status for one in found] == [429, 200]
    assert [one.due for one in found] == [one.sent for one in found], "the wait between the two is not the server's"


def test_a_closed_loop_ends_when_a_request_is_refused_until_its_deadline() -> None:
    async def refuse(body: bytes) -> bytes:
        return answer(429)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        loop = closed_loop(target(client, address, b"a", b"b", deadline=0.05), [0, 1], connections=1)
        return await asyncio.wait_for(loop, 60)

    found = with_server(refuse, ask)
    assert {one.status for one in found} == {429}
    assert {one.place for one in found} == {0}


def test_a_closed_loop_sends_in_order_what_there_is_room_for_and_a_larger_one_alone() -> None:
    under_way: list[int] = []
    seen: list[list[int]] = []

    async def handle(body: bytes) -> bytes:
        under_way.append(len(body))
        seen.append(sorted(under_way))
        await asyncio.sleep(0.01)
        under_way.remove(len(body))
        return answer(200)

    async def ask(client: Client, address: tuple[str, int]) -> list[Exchange]:
        bodies = [b"a" * size for size in (1, 4, 30)]
        rooms = [Room([1, 4, 30], 9), Room([1, 1, 1], 4)]
        return await closed_loop(
            target(client, address, *bodies), [1, 1, 0, 2, 0, 0, 0, 0, 0], connections=8, rooms=rooms
        )

    assert len(with_server(handle, ask)) == 9
    assert [found for found in seen if sum(found) > 9] == [[30]]
    assert [1, 4, 4] in seen
    assert max(map(len, seen)) == 4
