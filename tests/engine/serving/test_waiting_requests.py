"""What waits on a connection behind a request that is answered: how much is read, and what is done with the rest."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from cappy_engine.serving.http.connections import BoundedConnection, connection_class
from cappy_engine.serving.http.endpoint import respond
from cappy_engine.serving.http.transports import MAX_UNREAD_BYTES
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.server_options import ServerOptions
from tests.support.gated import SECONDS
from tests.support.wires import Wire

GET = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n"
NOT_HTTP = b"zz\r\n"
PART = b"x" * 16384


class Asked:
    """An application that answers with the size of the body, when it is let go; a connection to it, and its wire."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_go = asyncio.Event()
        self.metrics = Metrics()
        self.wire = Wire()
        kind = connection_class(ServerOptions(), self.metrics)
        config = uvicorn.Config(
            self.answer, http=kind, ws="none", lifespan="off", interface="asgi3", log_config=None, proxy_headers=False
        )
        self.connection: BoundedConnection = kind(config=config, server_state=ServerState(), app_state={})
        self.connection.connection_made(self.wire)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        await self.may_go.wait()
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await respond(send, 200, str(size).encode(), {})

    def send(self, data: bytes) -> None:
        """Have bytes arrive."""
        self.connection.data_received(data)

    def lose(self, error: Exception | None = None) -> None:
        """Have the client gone, once."""
        if self.connection in self.connection.connections:
            self.connection.connection_lost(error)

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(SECONDS):
            while not is_so():
                await asyncio.sleep(0.001)

    async def until_answered(self, count: int) -> None:
        """Wait until there are so many answers."""
        await self.until(lambda: self.answers() == count)

    def answers(self) -> int:
        """Count the answers."""
        return self.wire.written.count(b"HTTP/1.1 200 ")


def connected(test: Callable[[Asked], Awaitable[None]]) -> Callable[[], None]:
    """Make a test of a coroutine, which gets a connection."""

    def run() -> None:
        async def inside() -> None:
            asked = Asked()
            await test(asked)
            asked.lose()

        asyncio.run(inside())

    return run


@connected
async def test_a_body_that_waits_is_not_read_any_more_when_it_is_large_and_read_on_in_its_turn(asked: Asked) -> None:
    asked.send(GET)
    asked.send(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 163840\r\n\r\n")
    assert asked.wire.is_read  # little waits, and whether the client hangs up is heard
    sent = 0
    while asked.wire.is_read and sent < 10:
        asked.send(PART)
        sent += 1
    assert sent == 5
    asked.may_go.set()
    await asked.until(lambda: asked.wire.is_read)
    for _ in range(10 - sent):
        asked.send(PART)
        await asked.until(lambda: asked.wire.is_read)
    await asked.until_answered(2)
    assert asked.wire.written.endswith(b"\r\n\r\n163840")


@connected
async def test_bodies_that_wait_are_counted_together(asked: Asked) -> None:
    body = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 16384\r\n\r\n" + PART
    asked.send(GET)
    for _ in range(5):
        assert asked.wire.is_read
        asked.send(body)
    asked.send(body)
    assert not asked.wire.is_read
    asked.may_go.set()
    await asked.until_answered(7)
    assert asked.wire.is_read


@connected
async def test_64_requests_wait_and_what_comes_behind_them_is_not_read(asked: Asked) -> None:
    asked.send(GET * 65)
    asked.send(GET * 10)
    asked.may_go.set()
    await asked.until(asked.connection.transport.is_closing)
    assert asked.begun == asked.answers() == 65
    assert asked.wire.written.count(b"connection: close") == 1
    asked.send(GET * 10)
    assert not asked.wire.end  # else the system would forget answers while the client still sends


@connected
async def test_heads_wait_up_to_four_times_the_longest_one(asked: Asked) -> None:
    head = b"GET / HTTP/1.1\r\nhost: here\r\nx: %s\r\n\r\n" % (b"x" * 60 * 1024)
    for _ in range(20):
        asked.send(head)
    asked.may_go.set()
    await asked.until(asked.connection.transport.is_closing)
    assert asked.answers() == 6  # one that is answered, and five behind it, which are more than 256 KiB together


@connected
async def test_requests_that_wait_are_not_begun_where_the_client_hangs_up(asked: Asked) -> None:
    asked.send(GET * 3)
    await asked.until(lambda: asked.begun == 1)
    asked.lose()
    asked.may_go.set()
    await asked.until(lambda: not asked.connection.tasks)
    assert (asked.begun, asked.wire.written) == (1, b"")


@connected
async def test_a_wrong_body_of_a_request_that_waits_leaves_the_answer_before_it(asked: Asked) -> None:
    asked.send(GET)
    await asked.until(lambda: asked.begun == 1)
    asked.send(CHUNKED + NOT_HTTP)
    asked.send(GET)
    asked.may_go.set()
    await asked.until(asked.connection.transport.is_closing)
    assert (asked.begun, asked.answers(), asked.wire.written.count(b"HTTP/1.1 ")) == (1, 1, 1)


@connected
async def test_what_a_client_sends_after_the_last_answer_is_thrown_away_and_not_without_end(asked: Asked) -> None:
    asked.send(NOT_HTTP)
    assert asked.wire.written.startswith(b"HTTP/1.1 400 ")
    written = asked.wire.written
    block = bytes(MAX_UNREAD_BYTES // 4)
    for _ in range(4):
        asked.send(block)
        assert not asked.wire.end
    asked.send(b"x")
    assert (asked.wire.end, asked.wire.written) == ("closed", written)


@connected
async def test_no_second_answer_is_written_into_one_that_has_begun(asked: Asked) -> None:
    async def begin(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a part", "more_body": True})
        asked.begun += 1
        await asked.may_go.wait()

    asked.connection.config.loaded_app = begin
    asked.send(CHUNKED)
    await asked.until(lambda: asked.begun == 1)
    asked.send(NOT_HTTP)
    assert asked.wire.end == "aborted"
    assert asked.wire.written.endswith(b"a part\r\n")
    asked.may_go.set()
    await asked.until(lambda: not asked.connection.tasks)


@connected
async def test_a_wrong_body_ends_its_request_and_is_counted_once(asked: Asked) -> None:
    asked.may_go.set()
    asked.send(CHUNKED)
    await asked.until(lambda: asked.begun == 1)
    asked.send(NOT_HTTP)
    await asked.until(lambda: not asked.connection.tasks)
    assert asked.wire.written.count(b"HTTP/1.1 ") == asked.wire.written.count(b"HTTP/1.1 400 ") == 1
    page = asked.metrics.page().decode()
    assert '\ncappy_requests_total{route="other",status="400"} 1.0\n' in page
    refused = 'cappy_refused_requests_total{reason="validation"}'
    assert f"\n{refused} 0.0\n" in page  # its endpoint counts it as abandoned


@connected
async def test_a_connection_that_was_not_read_any_more_is_read_again_when_it_is_closed(asked: Asked) -> None:
    """What is unread then makes the system forget the answer."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        asked.begun += 1
        await asked.may_go.wait()
        await respond(send, 413, b"too large", {})

    asked.connection.config.loaded_app = refuse
    asked.send(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 163840\r\n\r\n")
    await asked.until(lambda: asked.begun == 1)
    asked.send(PART * 5)
    assert not asked.wire.is_read
    asked.may_go.set()
    await asked.until(asked.connection.transport.is_closing)
    asked.connection.shutdown()  # it is closed already
    assert (asked.wire.is_read, asked.wire.eofs, asked.wire.end) == (True, 1, "")
    assert asked.wire.written.endswith(b"too large")


@connected
async def test_heads_that_come_in_parts_are_counted_one_by_one(asked: Asked) -> None:
    asked.may_go.set()
    for number in range(1, 6):
        for part in (b"GET / HTTP/1.1\r\nhost: here\r\nx: ", PART, b"\r\n\r\n"):
            asked.send(part)
        await asked.until_answered(number)
    assert not asked.wire.end


@pytest.mark.parametrize("sent", [b"GET / HT", GET, GET + b"GET / HT"], ids=["half a head", "a request", "both"])
@pytest.mark.parametrize("error", [None, ConnectionResetError()], ids=["closed", "reset"])
def test_a_connection_that_is_gone_is_kept_by_no_timer(sent: bytes, error: Exception | None) -> None:
    async def lost() -> weakref.ref[BoundedConnection]:
        asked = Asked()
        asked.may_go.set()
        asked.send(sent)
        await asked.until(lambda: not asked.connection.tasks)
        asked.wire.close()
        asked.lose(error)
        return weakref.ref(asked.connection)

    async def inside() -> None:
        connection = await lost()
        gc.collect()
        assert connection() is None

    asyncio.run(inside())
