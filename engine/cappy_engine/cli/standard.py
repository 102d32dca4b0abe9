"""The process around a command: stdin, stdout and stderr, whatever they are, and the signals that end it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

from cappy_engine.errors import OutputError
from cappy_engine.storage import NamedFile


class Terminated(SystemExit):
    """A signal asks the process to end; unfinished files are closed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


_received: list[Terminated] = []


def ended_by(error: BaseException) -> BaseException:
    """Return the signal that ends the process, if one came, else `error`: libraries make errors of their own of it.

    >>> ended_by(ValueError("a text"))
    ValueError('a text')
    """
    return _received[0] if _received else error


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Open stdin, stdout and stderr on the null device if they are closed.

    Thus no other file gets their numbers. Reading a closed stdin ends at once, writing to a closed stdout is an error,
    and text for a closed stderr is lost. Texts that a terminal cannot show are escaped. An error of stdout names it.

        >>> with standard_streams():
        ...     print("a result")
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    before = (sys.stdin, sys.stdout, sys.stderr)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open as long as the process is
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_ClosedStdout(), write_through=True)
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__ and os.name == "posix":
        sys.stdout = _named(sys.stdout)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if sys.stdout is not before[1]:
            with contextlib.suppress(OSError, ValueError):  # who needs to know has flushed it before
                sys.stdout.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def is_closed(number: int) -> bool:
    """Tell if the process was started without stdin (0), stdout (1) or stderr (2).

    >>> is_closed(1)
    False
    """
    return (sys.__stdin__, sys.__stdout__, sys.__stderr__)[number] is None


def silence(stream: TextIO) -> None:
    """Have all that is written to `stream`, also what it holds back, go nowhere.

    >>> silence(sys.stdout)
    """
    with contextlib.suppress(OSError, ValueError):  # not a stream of the system
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Raise Terminated at SIGTERM and SIGHUP.

    This also works in process 1 of a container, which has no default action for these signals. If the parent process
    ignores a signal, it stays ignored. After the first signal, others do not disturb the way out.

        >>> with raised_signals():
        ...     export("my-checkpoint", "my-bundle")
    """
    asked = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        taken = []

    def leave(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        _received.append(Terminated(number))
        raise _received[0]

    _received.clear()
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """Yield a list that collects SIGTERM, SIGINT and SIGHUP. A server takes these signals over later.

        >>> with held_signals() as held:
        ...     run_server("cappy-bundle", ScorerOptions(), ServerOptions(), held)

    A signal that is still in the list at the end is raised again. Handlers collect the signals, not a mask: a mask
    belongs to one thread, and numpy's threads, which began before, would take the signal.
    """
    held: list[int] = []
    names = ("SIGTERM", "SIGINT", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def _named(stdout: io.TextIOWrapper) -> io.TextIOWrapper:
    """Make a stream like `stdout`, whose errors name it."""
    stdout.flush()
    raw = NamedFile(stdout.fileno(), "stdout", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stdout.encoding,
        line_buffering=stdout.line_buffering,
        write_through=stdout.write_through,
    )


class _ClosedStdout(io.RawIOBase):
    """Stands for a stdout that is closed: nothing is lost unseen."""

    def writable(self) -> bool:
        """Say yes, and raise at the first write."""
        return True

    def write(self, content: Any) -> int:
        """Raise OutputError."""
        raise OutputError("stdout is closed, so the results cannot be written")
