"""Speaks HTTP/1.1 to one server over connections that are kept.

It does little for a request: the server shares the cores with it, and it must not take what it measures.
A connection carries one request at a time. An answer must have a `content-length`; a chunked one is a BadAnswer.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)
PIECE_BYTES = 2**16
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class BadAnswer(Exception):
    """The answer cannot be read, or the connection was closed before it was complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The status and the body of an answer, and when its last byte came (`time.perf_counter`)."""

    status: int
    body: bytes
    ended: float


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
        async with asyncio.timeout(deadline_seconds):
            while self._idle:
                connection, received = self._idle.pop(), bytearray()
                if connection[0].at_eof():
                    connection[1].close()
                    continue
                try:
                    return await self._ask(connection, request, received)
                except BadAnswer:
                    if received:
                        raise
                    self.sent_again += 1
            connection = await asyncio.open_connection(self._host, self._port)
            return await self._ask(connection, request, bytearray())

    def close(self) -> None:
        """Close the connections that are not in use.

        >>> client.close()
        """
        while self._idle:
            self._idle.pop()[1].close()

    async def _ask(self, connection: Connection, request: bytes, received: bytearray) -> Answer:
        """Take the answer into `received`; a connection that cannot be used again is closed."""
        reader, writer = connection
        is_kept = False
        try:
            writer.write(request)
            while (found := read_answer(received)) is None:
                more = await reader.read(PIECE_BYTES)
                if not more:
                    raise BadAnswer("connection closed")
                received += more
            answer, is_last = found
            if not is_last:
                self._idle.append(connection)
                is_kept = True
            return answer
        except ConnectionError as error:
            raise BadAnswer("connection closed") from error
        finally:
            if not is_kept:
                writer.transport.abort()


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
