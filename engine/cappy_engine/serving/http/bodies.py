"""Read the body of a request: no more bytes than allowed, and no longer than allowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import cast

from starlette.types import Receive

from cappy_engine.errors import InvalidRequest, QueueFull


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


@dataclass
class BodyRoom:
    """The memory that bodies may fill together while they arrive and are decoded.

    >>> with BodyRoom(2**20).of_one() as take:
    ...     take(1000)
    """

    max_bytes: int
    held: int = 0

    @contextlib.contextmanager
    def of_one(self) -> Iterator[Callable[[int], None]]:
        """Yield `take(size)`, which reserves memory for more of one body, or raises QueueFull."""
        held = 0

        def take(size: int) -> None:
            nonlocal held
            if self.held + size > self.max_bytes:
                raise QueueFull(
                    f"the server is busy: bodies of {self.held + size} bytes are being read, and {self.max_bytes} "
                    "may be; send the request again later",
                    retry_seconds=1,
                )
            self.held += size
            held += size

        try:
            yield take
        finally:
            self.held -= held


async def read_body(
    receive: Receive, announced: str | None, *, max_bytes: int, seconds: float, take: Callable[[int], None]
) -> bytes:
    """Read a body, whose length may be `announced` in a header, while it streams.

    `take` is called with the size of each part. Raises what it raises, ClientGone, and InvalidRequest: 413 as soon as
    the body is longer than `max_bytes`, 408 if it takes more than `seconds`.

        >>> with BodyRoom(2**24).of_one() as take:
        ...     body = await read_body(receive, None, max_bytes=2**20, seconds=20, take=take)
    """
    too_large = f"the body has more than {max_bytes} bytes, which is max_body_bytes; send several requests"
    length = (announced or "").lstrip("0")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise InvalidRequest(too_large, 413)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                if size + len(part) > max_bytes:
                    raise InvalidRequest(too_large, 413)
                take(len(part))
                size += len(part)
                parts.append(part)
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError as error:
        raise InvalidRequest(f"the body did not arrive within {seconds:g} seconds; send it faster", 408) from error


@contextlib.asynccontextmanager
async def cancelled_when_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancel what runs inside, and raise ClientGone, if the client closes the connection; its body must have been read.

    >>> async with cancelled_when_gone(receive):
    ...     result = await service.score(request, "1")
    """
    task = cast("asyncio.Task[object]", asyncio.current_task())
    is_inside = True

    def cancel(gone: asyncio.Task[None]) -> None:
        if is_inside and not gone.cancelled():
            task.cancel()

    gone = asyncio.ensure_future(_until_gone(receive))
    gone.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if gone.done() and not gone.cancelled() and not task.uncancel():
            raise ClientGone from None
        raise
    finally:
        is_inside = False
        gone.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
