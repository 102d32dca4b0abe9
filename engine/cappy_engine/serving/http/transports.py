"""Read and end connections: a client gets its last answer before the end, and one that does not read is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

LINGER_SECONDS = 2.0
MAX_UNREAD_BYTES = 64 * 2**20
"""What a connection that was answered early may still send. An ordinary client sends its body before it reads."""


class BoundedTransport(asyncio.Transport):
    """A transport that closes gently, and gives up a client that stops reading.

    It gives up if bytes wait and the client takes none within a period of `idle_seconds`.

    If a socket is closed while its client sends, the system forgets the answer. So if `has_unread` says that more may
    come, `close` sends the answer and the end. The bytes that come are thrown away, for LINGER_SECONDS at most.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        idle_seconds: float,
        has_unread: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.is_lingering = False
        self._transport = transport
        self._loop = loop
        self._idle_seconds = idle_seconds
        self._has_unread = has_unread
        self._written = 0
        self._unread_bytes = 0
        self._linger: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, and begin to watch whether the client takes them."""
        self._written += len(data)
        self._transport.write(data)
        if self._watch is None:
            self._watch_from(self._taken())

    def close(self) -> None:
        """Close when all is sent; read on for a while if the client may still be sending."""
        if self.is_closing():
            return
        if not self._has_unread():
            self.close_now()
            return
        self.is_lingering = True
        self._linger = self._loop.call_later(LINGER_SECONDS, self.close_now)
        self._transport.resume_reading()
        self._transport.write_eof()

    def close_now(self) -> None:
        """Close when all is sent, whatever comes."""
        self._transport.close()

    def abort(self) -> None:
        """Close, and send no more."""
        self._transport.abort()

    def discard(self, size: int) -> None:
        """Count bytes that came after the last answer; close if they are too many."""
        self._unread_bytes += size
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self.close_now()

    def lost(self) -> None:
        """Stop all timers: the connection is gone."""
        for timer in (self._linger, self._watch):
            if timer is not None:
                timer.cancel()

    def is_closing(self) -> bool:
        """Tell if nothing is answered any more."""
        return self.is_lingering or self._transport.is_closing()

    def pause_reading(self) -> None:
        """Let the client wait with what it sends."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Ask for the socket, or an address."""
        return self._transport.get_extra_info(name, default)

    def _taken(self) -> int:
        return self._written - self._transport.get_write_buffer_size()

    def _watch_from(self, taken: int) -> None:
        self._watch = self._loop.call_later(self._idle_seconds, self._give_up_unless_more_than, taken)

    def _give_up_unless_more_than(self, taken: int) -> None:
        """Close if the client took nothing for a while, though there is something to take."""
        self._watch = None
        if self._taken() == self._written:
            return
        if self._taken() == taken:
            self.abort()
        else:
            self._watch_from(self._taken())


class BoundedFlow(FlowControl):
    """uvicorn's flow control, which reads no more while `is_full`."""

    def __init__(self, transport: asyncio.Transport, is_full: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._is_full = is_full

    def resume_reading(self) -> None:
        """Read on, if there is room."""
        if not self._is_full():
            super().resume_reading()
