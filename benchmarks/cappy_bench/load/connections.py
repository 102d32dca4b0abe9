"""Speaks HTTP/1.1 to one server over connections that are kept.

It does little for a request: the server shares the cores with it, and it must not take what it measures.
A connection carries one request at a time. An answer must have a `content-length`; a chunked one is a BadAnswer.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import cast

HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)


class BadAnswer(Exception):
    """What came back is not an answer that can be read, or the connection was closed before it was complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The status and the body of an answer, and when its last byte came (`time.perf_counter`)."""

    status: int
    body: bytes
    ended: float


class Connection(asyncio.Protocol):
    """One connection; `is_fresh` until its first answer is complete."""

    def __init__(self) -> None:
        self.is_open = self.is_fresh = True
        self.has_begun = False
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._waiter: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, which asyncio passes."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take bytes in; the request that waits gets its answer when it is complete."""
        self.has_begun = True
        self._received += data
        if self._waiter is None or self._waiter.done():
            self.close()  # nothing was asked
            return
        try:
            found = read_answer(self._received)
        except BadAnswer as error:
            self.close()
            self._waiter.set_exception(error)
            return
        if found is not None:
            answer, is_last = found
            self._received.clear()
            self.is_fresh = False
            if is_last:
                self.close()
            self._waiter.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request that waits."""
        self.is_open = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(BadAnswer("connection closed"))

    async def ask(self, request: bytes, deadline_seconds: float) -> Answer:
        """Send a whole request and wait for the answer. Raises BadAnswer, and TimeoutError at the deadline.

        >>> await connection.ask(b"GET /ready HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n", 5.0)
        """
        if self._transport is None or not self.is_open:
            raise BadAnswer("connection closed")
        loop = asyncio.get_running_loop()
        self._waiter, self.has_begun = loop.create_future(), False
        timer = loop.call_later(deadline_seconds, self._give_up)
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def close(self) -> None:
        """Close the connection at once.

        >>> connection.close()
        """
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def _give_up(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError())
        self.close()


class Client:
    """Asks one server, over as many connections as requests wait at once; the one used last is used first.

    A server may close a connection that nobody uses. If that meets a request before a byte of its answer came, the
    request is sent again over another connection, as RFC 9112 (9.3.1) tells clients; `sent_again` counts them.
    """

    def __init__(self, host: str, port: int) -> None:
        self.sent_again = 0
        self._host, self._port = host, port
        self._idle: list[Connection] = []

    async def ask(self, request: bytes, deadline_seconds: float) -> Answer:
        """Send a whole request and wait for its answer.

        Raises BadAnswer, OSError where no connection can be made, and TimeoutError at the deadline.

        >>> (await client.ask(b"GET /ready HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n", 5.0)).status
        200
        """
        while True:
            connection = await self._take(deadline_seconds)
            was_used = not connection.is_fresh
            try:
                answer = await connection.ask(request, deadline_seconds)
            except BadAnswer:
                if was_used and not connection.has_begun:
                    self.sent_again += 1
                    continue
                raise
            if connection.is_open:
                self._idle.append(connection)
            return answer

    def close(self) -> None:
        """Close the connections that are not in use.

        >>> client.close()
        """
        while self._idle:
            self._idle.pop().close()

    async def _take(self, deadline_seconds: float) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        connecting = loop.create_connection(Connection, self._host, self._port)
        return (await asyncio.wait_for(connecting, deadline_seconds))[1]


def read_answer(received: bytes | bytearray) -> tuple[Answer, bool] | None:
    r"""Read an answer and whether the server closes the connection after it; None if bytes are missing.

    Raises BadAnswer for anything else than one answer of HTTP/1.1 with a `content-length`.

        >>> read_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")[0].body
        b'ok'
    """
    end = received.find(HEAD_END)
    if end < 0:
        return None
    head = bytes(received[: end + 2])
    length = LENGTH.search(head)
    if not head.startswith(b"HTTP/1.1 ") or not head[9:12].isdigit():
        raise BadAnswer("not an answer of HTTP/1.1")
    if length is None:
        raise BadAnswer("an answer without content-length")
    begin = end + len(HEAD_END)
    body = bytes(received[begin : begin + int(length[1])])
    if len(body) < int(length[1]):
        return None
    if len(received) > begin + len(body):
        raise BadAnswer("more bytes than content-length says")
    return Answer(int(head[9:12]), body, time.perf_counter()), CLOSES.search(head) is not None


def post(address: tuple[str, int], path: str, body: bytes) -> bytes:
    """Write a whole request that posts JSON.

    >>> post(("127.0.0.1", 8000), "/v1/rank", b"{}")
    """
    host, port = address
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
