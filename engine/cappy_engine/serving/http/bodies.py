"""Read the body of a request: no more bytes than allowed, and no longer than allowed."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from cappy_engine.errors import InvalidRequest


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


async def read_body(receive: Receive, announced: str | None, *, max_bytes: int, seconds: float) -> bytes:
    """Read a body, whose length may be `announced` in a header, while it streams.

    Raises InvalidRequest (413) as soon as it is longer than `max_bytes`, (408) if it takes more than `seconds`, and
    ClientGone.

        >>> body = await read_body(receive, None, max_bytes=2**20, seconds=20)
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
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise InvalidRequest(too_large, 413)
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError as error:
        raise InvalidRequest(f"the body did not arrive within {seconds:g} seconds; send it faster", 408) from error


async def until_gone(receive: Receive) -> None:
    """Wait until the client closes the connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
