"""What the heads of requests take in memory is bounded, whatever is in them."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from cappy_engine.serving.http.connections import BoundedConnection, connection_class
from cappy_engine.serving.http.endpoint import respond
from cappy_engine.serving.http.heads import HeadRoom
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.server_options import ServerOptions
from tests.support.gated import SECONDS

LINE = b"GET / HTTP/1.1\r\nhost: here\r\n"
GET = LINE + b"\r\n"
LONGEST = 64 * 1024
EMOJI = b"%F0%9F%98%80"
"""Makes every character of a path take four bytes."""


class Answering:
    """A server in this process, which listens, and answers when it is let go."""

    def __init__(self) -> None:
        self.may_go = asyncio.Event()
        self.connections: list[BoundedConnection] = []
        self.room = HeadRoom()
        self.read_bytes = 0
        self.port = 0
        self.state = ServerState()
        counting = self

        class Connection(connection_class(ServerOptions(), Metrics())):  # type: ignore[misc]  # a class made there
            room = self.room

            def data_received(self, data: bytes) -> None:
                super().data_received(data)
                counting.read_bytes += len(data)

        config = uvicorn.Config(
            self._answer,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
        )

        def connected() -> BoundedConnection:
            self.connections.append(Connection(config=config, server_state=self.state, app_state={}))
            return self.connections[-1]

        self.connected = connected

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.may_go.wait()
        await respond(send, 200, b"alive", {})

    async def connect(self) -> socket.socket:
        """Open a connection."""
        client = socket.socket()
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        return client

    async def send(self, client: socket.socket, data: bytes) -> None:
        """Send, and wait until the server has taken it."""
        expected = self.read_bytes + len(data)
        await asyncio.get_running_loop().sock_sendall(client, data)
        await until(lambda: self.read_bytes >= expected)


@asynccontextmanager
async def answering() -> AsyncIterator[Answering]:
    """Listen for a while."""
    server = Answering()
    listener = await asyncio.get_running_loop().create_server(server.connected, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for connection in server.connections:
            connection.transport.abort()
        await asyncio.sleep(0.01)


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(SECONDS):
        while not is_so():
            await asyncio.sleep(0)


def break_off(client: socket.socket) -> None:
    """Close a connection as a process does that dies with unread bytes."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def received(client: socket.socket) -> bytes:
    """Read until the server closes."""
    loop, found = asyncio.get_running_loop(), b""
    async with asyncio.timeout(SECONDS):
        while part := await loop.sock_recv(client, 65536):
            found += part
    return found


HEADS = {
    "1,850 empty headers": LINE + b"a:\r\n" * 1850 + b"\r\n",
    "300 empty headers": LINE + b"a:\r\n" * 300 + b"\r\n",
    "300 short headers": LINE + b"ab: cd\r\n" * 300 + b"\r\n",
    "60 KiB in a header": LINE + b"x: " + b"y" * 60 * 1024 + b"\r\n\r\n",
    "no headers": GET,
    "a long path": b"GET /" + b"a" * 30_000 + GET[5:],
    "a path of wide characters": b"GET /" + b"a" * 60_000 + EMOJI + GET[5:],
    "a shorter path of wide characters": b"GET /" + b"a" * 12_000 + EMOJI + GET[5:],
    "a long query": b"GET /?" + b"a" * 60_000 + GET[5:],
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_take_no_more_memory_than_a_connection_may(head: bytes) -> None:
    """One that is answered, those that wait, and the one that is too much for them."""

    async def inside() -> int:
        async with answering() as server:
            warm = await server.connect()
            await server.send(warm, head)
            client = await server.connect()
            await server.send(client, LINE[:5])
            gc.collect()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                await server.send(client, LINE[5:] + b"\r\n")
                for _ in range(70):
                    await server.send(client, head)
                gc.collect()
                return tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
                warm.close()
                client.close()

    assert asyncio.run(inside()) <= LONGEST + 4 * LONGEST + LONGEST


def test_heads_that_wait_on_all_connections_are_counted_together() -> None:
    """Where they are too many, a connection is closed behind the request that is answered."""
    long, last = HEADS["60 KiB in a header"], LINE + b"connection: close\r\n\r\n"

    async def inside() -> None:
        async with answering() as server:
            server.room.max_bytes = 100_000
            first, gone, third, fourth = [await server.connect() for _ in range(4)]
            await server.send(first, GET + long + last)
            await server.send(gone, GET + long)
            await server.send(third, GET * 2)
            await server.send(fourth, last)
            gone.close()
            server.may_go.set()
            assert [(await received(each)).count(b" 200 OK") for each in (first, third, fourth)] == [3, 1, 1]
            await until(lambda: server.room.held == 0)
            again = await server.connect()
            await server.send(again, GET * 2 + last)
            assert (await received(again)).count(b" 200 OK") == 3

    asyncio.run(inside())


def test_a_hundred_ordinary_headers_are_taken_ten_times() -> None:
    head = LINE + b"".join(b"x-ordinary-header-%d: %s\r\n" % (each, b"v" * 300) for each in range(100))

    async def inside() -> bytes:
        async with answering() as server:
            server.may_go.set()
            client = await server.connect()
            for _ in range(9):
                await server.send(client, head + b"\r\n")
                await asyncio.sleep(0)
            await server.send(client, head + b"connection: close\r\n\r\n")
            return await received(client)

    assert asyncio.run(inside()).count(b" 200 OK") == 10


def test_a_connection_that_is_broken_off_between_requests_is_kept_by_no_timer() -> None:
    async def inside() -> None:
        async with answering() as server:
            server.may_go.set()
            client = await server.connect()
            await server.send(client, GET)
            assert b" 200 OK" in await asyncio.get_running_loop().sock_recv(client, 65536)
            break_off(client)
            connection = weakref.ref(server.connections[0])
            await until(lambda: not server.state.connections)
            server.connections.clear()
            await asyncio.sleep(0)
            gc.collect()
            assert connection() is None

    asyncio.run(inside())


def test_the_heads_of_a_connection_that_is_gone_are_free_at_once() -> None:
    """Python's collector may come only when there are many more of them."""

    async def inside() -> int:
        async with answering() as server:
            client = await server.connect()
            await server.send(client, LINE[:5])
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                await server.send(client, LINE[5:] + b"\r\n" + HEADS["60 KiB in a header"] * 5)
                assert tracemalloc.get_traced_memory()[0] - before > 4 * LONGEST
                break_off(client)
                await until(lambda: not server.state.connections)
                server.may_go.set()
                await until(lambda: not server.state.tasks)
                return tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
                gc.enable()

    assert asyncio.run(inside()) < LONGEST // 2
