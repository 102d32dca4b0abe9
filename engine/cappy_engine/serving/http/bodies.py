"""Read the body of a request: no more bytes than allowed, and no longer than allowed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import Receive

from cappy_engine.errors import InvalidRequest, QueueFull


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


@dataclass
class BodyRoom:
    """The memory that bodies may fill together while they arrive.

    >>> room = BodyRoom(2**20)
    >>> room.take(1000)
    """

    max_bytes: int
    held: int = 0

    def take(self, size: int) -> None:
        """Hold more bytes. Raises QueueFull where they do not fit."""
        if self.held + size > self.max_bytes:
            raise QueueFull(
                f"the server is busy: bodies of {self.held + size} bytes arrive at once, and {self.max_bytes} may; "
                "send the request again later",
                retry_seconds=1,
            )
        self.held += size

    def give_back(self, size: int) -> None:
        """Hold them no longer."""
        self.held -= size


async def read_body(
    receive: Receive, announced: str | None, *, max_bytes: int, seconds: float, room: BodyRoom
) -> bytes:
    """Read a body, whose length may be `announced` in a header, while it streams.

    Raises InvalidRequest (413) as soon as it is longer than `max_bytes`, (408) if it takes more than `seconds`,
    QueueFull if too many bodies arrive at once, and ClientGone.

        >>> body = await read_body(receive, None, max_bytes=2**20, seconds=20, room=BodyRoom(2**24))
    """
    too_large = f"the body has more than {max_bytes} bytes, which is max_body_bytes; send several requests"
    if announced is not None and announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
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
                room.take(len(part))
                size += len(part)
                parts.append(part)
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError as error:
        raise InvalidRequest(f"the body did not arrive within {seconds:g} seconds; send it faster", 408) from error
    finally:
        room.give_back(size)


async def until_gone(receive: Receive) -> None:
    """Wait until the client closes the connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
