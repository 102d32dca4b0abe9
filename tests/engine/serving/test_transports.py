"""How a connection ends: timers that the test lets go, so that nothing depends on the machine's speed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from cappy_engine.serving.http.transports import LINGER_SECONDS, MAX_UNREAD_BYTES, BoundedTransport
from tests.support.wires import Wire


class Clock:
    """A loop's timers: they go off when the test says so."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, do: Callable[..., object], *arguments: Any) -> Timer:
        self.timers.append(Timer(seconds, do, arguments))
        return self.timers[-1]

    def ring(self) -> float:
        """Let the one timer go that runs; returns its seconds."""
        (timer,) = [timer for timer in self.timers if timer.runs]
        timer.runs = False
        timer.do(*timer.arguments)
        return timer.seconds


class Timer:
    def __init__(self, seconds: float, do: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.seconds, self.do, self.arguments, self.runs = seconds, do, arguments, True

    def cancel(self) -> None:
        self.runs = False


class Socket(Wire):
    """A wire that holds what its client did not take."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0

    def write(self, data: Any) -> None:
        self.held += len(data)

    def get_write_buffer_size(self) -> int:
        return self.held


def made(*, has_unread: bool = False) -> tuple[BoundedTransport, Socket, Clock]:
    """Make a transport whose client may be idle for 5 seconds."""
    below, clock = Socket(), Clock()
    loop = cast(asyncio.AbstractEventLoop, clock)
    return BoundedTransport(below, loop, 5, lambda: has_unread), below, clock


def test_a_client_that_reads_slowly_hears_all_of_its_answer() -> None:
    transport, below, clock = made()
    transport.write(b"x" * 100)
    for _ in range(9):
        below.held -= 10
        assert clock.ring() == 5
        assert not below.end
    below.held = 0
    clock.ring()
    assert not [timer for timer in clock.timers if timer.runs]
    transport.write(b"y" * 100)  # the next answer is watched, too
    below.held -= 10
    clock.ring()
    clock.ring()
    assert below.end == "aborted"


def test_a_client_that_took_nothing_for_the_idle_seconds_is_given_up() -> None:
    transport, below, clock = made()
    transport.write(b"x" * 100)
    assert clock.ring() == 5
    assert below.end == "aborted"


def test_a_client_that_still_sends_is_listened_to_for_two_seconds_at_most() -> None:
    transport, below, clock = made(has_unread=True)
    transport.close()
    assert (transport.is_closing(), below.end) == (True, "")
    assert clock.ring() == LINGER_SECONDS
    assert below.end == "closed"


def test_a_client_that_sends_without_end_is_closed_before() -> None:
    transport, below, _ = made(has_unread=True)
    transport.close()
    ends: list[str] = []
    for size in (MAX_UNREAD_BYTES, 1):
        transport.discard(size)
        ends.append(below.end)
    assert ends == ["", "closed"]


def test_a_connection_that_is_gone_leaves_no_timer() -> None:
    transport, _, clock = made(has_unread=True)
    transport.write(b"x")
    transport.close()
    assert sum(timer.runs for timer in clock.timers) == 2
    transport.lost()
    assert not any(timer.runs for timer in clock.timers)
