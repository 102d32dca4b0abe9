"""Bound what uvicorn leaves open: how long the headers of a request may take, and how many bytes they may have."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 2**10


class BoundedConnection(HttpToolsProtocol):
    """A connection that is closed if it sends no whole request head within `header_seconds`, or too long a one.

    uvicorn has a time limit between requests only: a client that sends nothing, or a byte now and then, would stay.
    """

    header_seconds = 20.0
    _until_head: asyncio.TimerHandle | None = None
    _is_in_head = False
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn's
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take what arrives; close the connection where a request's head is too long."""
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self.send_400_response(f"the headers have more than {MAX_HEADER_BYTES} bytes")

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of a request's head."""
        super().on_message_begin()
        self._is_in_head = True
        self._head_bytes = 0
        if self._until_head is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        """Wait no longer: the head is there."""
        self._is_in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._until_head = self.loop.call_later(self.header_seconds, self._close_if_waiting)

    def _stop_waiting(self) -> None:
        if self._until_head is not None:
            self._until_head.cancel()
            self._until_head = None

    def _close_if_waiting(self) -> None:
        """Close the connection, but not before the request before on it is answered."""
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._wait_for_head()
        elif not self.transport.is_closing():
            self.transport.close()
