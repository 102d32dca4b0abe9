"""Count what heads of requests take in memory: of one request, of all that wait on a connection, and on all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cappy_engine.serving.http.refusals import FIELD_BYTES, LONG_HEAD, MAX_HEADER_BYTES, Refused

REQUEST_BYTES = 3 * 2**10
"""What each request that waits is counted for beside its head."""
HEAD_BYTES = "cappy.head_bytes"
"""The key of a request's state for the bytes of its head."""
MAX_WAITING = 64
"""The requests that may wait on a connection behind the one that is answered. What comes after them is not read."""
MAX_WAITING_HEADS = 4 * MAX_HEADER_BYTES
"""The bytes of their heads, likewise."""
MAX_ALL_WAITING_HEADS = 256 * MAX_WAITING_HEADS
"""The bytes of the heads that wait on all connections. Above it nothing more waits on any."""


class HeadCount:
    """The bytes of a connection since its last step: the next head or part of a body, or the end of a request.

    Raises Refused as soon as they are too many.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.told = 0
        """What the path and the fields count that the parser told: each of them once it is whole."""
        self._loose = 0
        """The bytes that are not of a body: of a head, of the fields behind a body, of chunk sizes."""

    def step(self) -> None:
        """Begin again."""
        self.steps += 1
        self._loose = self.told = 0

    def add_loose(self, size: int) -> None:
        """Count bytes that came, and may not be told yet."""
        self._loose += size
        self._check()

    def add_path(self, path: bytes) -> None:
        """Count a part of the path."""
        self.told += len(path)
        self._check()

    def add_decoded(self, url: bytes) -> None:
        """Count the path once more as text: it takes four bytes for each character, where one of them is rare."""
        path = url.partition(b"?")[0]
        self.told += len(path) * (4 if b"%" in path else 1)
        self._check()

    def add_field(self, name: bytes, value: bytes) -> None:
        """Count a header, or a field behind a body."""
        self.told += len(name) + len(value) + FIELD_BYTES
        self._check()

    def _check(self) -> None:
        if max(self._loose, self.told) > MAX_HEADER_BYTES:
            raise Refused(LONG_HEAD)


@dataclass
class HeadRoom:
    """Limits the memory that the waiting heads of all a server's connections fill together."""

    max_bytes: int = MAX_ALL_WAITING_HEADS
    held: int = 0


class WaitingHeads:
    """The heads that wait on one connection.

    >>> heads = WaitingHeads(HeadRoom())
    >>> heads.hold([70000] * 4)
    >>> heads.are_too_many
    True
    """

    def __init__(self, room: HeadRoom) -> None:
        self._room = room
        self._count = 0
        self._held = 0

    @property
    def are_too_many(self) -> bool:
        """Tell if nothing more may wait on the connection."""
        return self._count >= MAX_WAITING or self._held > MAX_WAITING_HEADS or self._room.held > self._room.max_bytes

    def hold(self, heads: Iterable[int]) -> None:
        """Count these heads, by the bytes of each, in the place of those before."""
        sizes = [REQUEST_BYTES + size for size in heads]
        self._count = len(sizes)
        self._room.held += sum(sizes) - self._held
        self._held = sum(sizes)


def head_without_offer(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    r"""Write a request's head again, without its offer to change the protocol.

    >>> head_without_offer(b"GET", b"/", "1.1", [(b"host", b"here"), (b"upgrade", b"h2c")])
    b'GET / HTTP/1.1\r\nhost: here\r\n\r\n'
    """
    lines = [b"%s: %s" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join([b"%s %s HTTP/%s" % (method, url, version.encode()), *lines, b"", b""])
