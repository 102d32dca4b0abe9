"""Bound what uvicorn leaves open: how much a connection may send, and how long it may stay.

uvicorn limits the time between two requests only. It buffers without a limit what a client sends early, and the fields
after a body. It forgets the time limit when a byte comes at the wrong moment.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cappy_engine.serving.http.heads import HEAD_BYTES, HeadCount, HeadRoom, WaitingHeads, head_without_offer
from cappy_engine.serving.http.refusals import (
    NOT_HTTP,
    SPARE_CONNECTIONS,
    SPARE_SECONDS,
    Refused,
    TooMany,
    bytes_of,
    check_head,
    too_many_connections,
)
from cappy_engine.serving.http.transports import BoundedFlow, BoundedTransport
from cappy_engine.serving.metrics import NO_ROUTE, Metrics
from cappy_engine.serving.openapi import PROBES
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.statuses import Failure

ALWAYS_ANSWERED = {path.encode() for path in (*PROBES, "/metrics")}


def connection_class(options: ServerOptions, counters: Metrics) -> type[BoundedConnection]:
    """Make the class of a server's connections, as uvicorn takes it.

    >>> uvicorn.Config(app, http=connection_class(ServerOptions(idle_seconds=10), Metrics()))
    """

    class Connection(BoundedConnection):
        bounds, metrics, room = options, counters, HeadRoom()

    return Connection


class BoundedConnection(HttpToolsProtocol):
    """A connection that holds no more than it may. It is closed if no whole request head comes in time."""

    bounds: ServerOptions
    metrics: Metrics
    room: HeadRoom
    _out: BoundedTransport
    _unanswered: deque[Any]
    """uvicorn's cycles: the request that is answered, and those that wait behind it."""
    _was_asked = False
    _is_spare = False
    """It is above the limit: probes are answered, one on a connection."""
    _until_head: asyncio.TimerHandle | None = None
    _is_in_message = False
    _is_in_head = False
    _is_deaf = False
    """Nothing that comes is read any more."""

    # What happens to the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn's
        """Begin to wait for the first request."""
        self._out = BoundedTransport(transport, self.loop, self.bounds.idle_seconds, self._has_unread)
        self._unanswered = deque()
        self._head = HeadCount()
        self._waiting = WaitingHeads(self.room)
        super().connection_made(self._out)
        self.app = self._answer
        self.flow = BoundedFlow(self._out, self._is_full)
        above = len(self.connections) - self.bounds.max_connections
        self._is_spare = above > 0
        if above <= SPARE_CONNECTIONS:
            self._wait_for_head()
        else:
            self._out.abort()

    def data_received(self, data: bytes) -> None:
        """Take what arrives, as far as it may."""
        if self._out.is_lingering:
            self._out.discard(len(data))
        if self._is_deaf or self._out.is_closing():
            return
        self._unset_keepalive_if_required()
        steps = self._head.steps
        try:
            self._parse(data)
            if self._head.steps == steps:  # not all of it is told to `on_header`: what is not at its end is not
                self._head.add_loose(len(data))
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, TooMany):
                self._is_deaf = True
                self._unanswered[-1].keep_alive = False
            else:
                self._refuse(cause.failure if isinstance(cause, Refused) else NOT_HTTP)
        except Refused as error:
            self._refuse(error.failure)
        self._wait_if_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests of the connection that their client is gone. Those that were not begun are forgotten."""
        self._stop_waiting()
        self._unset_keepalive_if_required()  # uvicorn leaves that timer where the client broke the connection off
        self._out.lost()
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        self._count_waiting()
        super().connection_lost(exc)
        while len(self._unanswered) > 1:  # the first one may still be begun
            self._unanswered.pop()
        self.url = b""  # these, too, since Python may find only later that nobody needs `self`
        self.cycle = self.scope = self.headers = None  # type: ignore[assignment]

    # What the parser finds

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of a request's head."""
        if self._unanswered and self._waiting.are_too_many:
            raise TooMany
        super().on_message_begin()
        self._is_in_message = self._is_in_head = True
        self._head.step()
        if self._until_head is None:
            self._wait_for_head()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's path."""
        self._head.add_path(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; fields behind a body are counted only."""
        self._head.add_field(name, value)
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Wait no longer: the head is there."""
        if self._is_offer():
            return
        self._head.add_decoded(self.url)
        check_head(version := self.parser.get_http_version(), self.headers)
        if self._is_spare and self.url.partition(b"?")[0] not in ALWAYS_ANSWERED:
            raise Refused(too_many_connections(self.bounds.max_connections))
        self._is_in_head = False
        self.scope["state"][HEAD_BYTES] = self._head.told
        self._head.step()
        self._stop_waiting()
        self.expect_100_continue = self.expect_100_continue and version != "1.0"
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        self._count_waiting()
        self._was_asked = True
        self.flow.resume_reading()  # else nobody would hear that a client with several requests hangs up

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._head.step()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        if self._is_offer():
            return
        self._is_in_message = False
        self._head.step()
        super().on_message_complete()

    # How it is answered

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; if its body is not whole by then, it is the connection's last."""
        cycle = self._unanswered[0]

        async def send_on(message: Message) -> None:
            if (cycle.more_body or self._is_spare) and message["type"] == "http.response.start":
                cycle.keep_alive = False
            await send(message)

        try:
            await self.config.loaded_app(scope, receive, send_on)
        except asyncio.CancelledError:  # the time to end is over, and the client does not read
            cycle.disconnected = True
            self._out.abort()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        self._unanswered.popleft()
        super().on_response_complete()
        self._count_waiting()

    def _refuse(self, failure: Failure) -> None:
        """Take no more, and say why, in the place of the request that is wrong.

        Where others before it are not answered yet, the connection is closed behind their answers instead.
        """
        self._is_deaf = True
        wrong = self._unanswered[-1] if self._unanswered and self._unanswered[-1].more_body else None
        if wrong is not None and self.pipeline:  # its body is wrong, and it was not begun
            self.pipeline.popleft()
            self._unanswered.pop()
            self._count_waiting()
        elif wrong is not None:
            wrong.disconnected = True
            wrong.message_event.set()
            if wrong.response_started:
                self._out.abort()
                return
        if self._unanswered and self._unanswered[-1] is not wrong:
            self._unanswered[-1].keep_alive = False
            return
        self._out.write(bytes_of(failure))
        self.metrics.answered(NO_ROUTE, failure.status)
        if wrong is None or not wrong.disconnected:  # else it counts as abandoned
            self.metrics.refused(failure.error_type)
        self._out.close()

    # What is read, and counted

    def _parse(self, data: bytes) -> None:
        """Read requests. The parser stops at an offer to change the protocol, and would not read that request's body.

        No offer is taken, so the parser is told the head again without it. Java's client offers HTTP/2 by default.
        """
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._is_offer():
                    method, version = self.parser.get_method(), self.parser.get_http_version()
                    data = head_without_offer(method, self.url, version, self.headers) + data
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            else:
                return

    def _is_offer(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _has_unread(self) -> bool:
        return self._is_in_message or self._is_deaf

    def _is_full(self) -> bool:
        """Tell if the bodies that wait hold more than they may."""
        return sum(len(cycle.body) for cycle, _ in self.pipeline) > HIGH_WATER_LIMIT

    def _count_waiting(self) -> None:
        self._waiting.hold(cycle.scope["state"][HEAD_BYTES] for cycle, _ in self.pipeline)

    # How long it stays

    def _wait_if_idle(self) -> None:
        """Start uvicorn's time between requests again, where bytes came that begin no request."""
        is_idle = self._was_asked and not self._unanswered and not self._is_in_message
        if is_idle and self.timeout_keep_alive_task is None and not self._out.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _wait_for_head(self) -> None:
        seconds = min(self.bounds.body_seconds, SPARE_SECONDS if self._is_spare else float("inf"))
        self._until_head = self.loop.call_later(seconds, self._close_if_waiting)

    def _stop_waiting(self) -> None:
        if self._until_head is not None:
            self._until_head.cancel()
            self._until_head = None

    def _close_if_waiting(self) -> None:
        """Close the connection, but not before the request before on it is answered."""
        if self._unanswered:
            self._wait_for_head()
        elif self._is_spare and not self._is_deaf:
            self._refuse(too_many_connections(self.bounds.max_connections))
        elif not self._out.is_closing():
            self._out.close_now()
