"""A server of HTTP/1.1 in this process, which answers whatever a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Handle = Callable[[bytes], Awaitable[bytes]]
"""What a server answers to the body of a request: the bytes of an answer, none to close the connection."""


def answer(status: int, body: bytes = b"ok", more: str = "") -> bytes:
    """Write an answer, with `more` lines of its head."""
    return f"HTTP/1.1 {status} Any\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


@asynccontextmanager
async def answering(handle: Handle) -> AsyncIterator[tuple[str, int]]:
    """Serve on the loopback, over connections that are kept."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                found = await handle(await reader.readexactly(length))
                if not found:
                    break
                writer.write(found)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[:2]
