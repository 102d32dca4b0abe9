"""Read lines of bytes, each up to a limit, and notice when a stream pauses. Knows nothing of what the lines hold."""

from __future__ import annotations

import io
import os
import select
import stat
import time
from collections.abc import Iterable, Iterator
from typing import cast

from cappy_engine.errors import InvalidLine
from cappy_engine.overlap import check_waited_for

MAX_LINE_BYTES = 16 * 2**20
"""Longer lines are refused. A line is held in memory, and so is all that it becomes."""
PAUSE_SECONDS = 0.05
"""A stream from which nothing comes for so long pauses."""
LONGEST_WAIT_SECONDS = 0.5
"""Nothing that came is held back longer than this, also if a stream never pauses."""
SKIPPED_AT_A_TIME = 2**20


class Lines:
    """Iterates over lines. None stands for a pause of a pipe, a terminal or a socket.

    Of a line longer than `max_line_bytes` only the beginning is given: see `check_length`. The rest is passed over when
    the next line is asked for, or by `pass_over`; `bytes_read` counts it, too. Until then `is_within` is true.

        >>> list(Lines([b"one\\n", b"two"], 100))
        [b'one\\n', b'two']
    """

    def __init__(self, lines: Iterable[bytes], max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.bytes_read = 0
        self.is_within = False
        self._lines = lines
        self._limit = max_line_bytes
        self._parts: Iterator[bytes | None] = iter(())

    def __iter__(self) -> Iterator[bytes | None]:
        if not hasattr(self._lines, "readline"):
            for line in self._lines:
                self.bytes_read += len(line)
                yield line
            return
        file = cast(io.BufferedReader, self._lines)
        stream = _may_pause(file)
        self._parts = _parts_of_stream(file, self._limit) if stream else _parts_of_file(file, self._limit)
        for part in self._parts:
            if part is None:
                yield None
            elif self.is_within:
                self._pass(part)
            else:
                self.bytes_read += len(part)
                self.is_within = len(part) > self._limit and not part.endswith(b"\n")
                yield part
        self.is_within = False

    def pass_over(self) -> None:
        """Go to the end of a line that was too long."""
        while self.is_within:
            self._pass(next(self._parts, b""))

    def _pass(self, part: bytes | None) -> None:
        check_waited_for()  # the line may have gigabytes
        self.bytes_read += len(part or b"")
        self.is_within = part is None or (part != b"" and not part.endswith(b"\n"))


def numbered(lines: Iterable[bytes], max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers from 1. Raises InvalidLine for one longer than `max_line_bytes`.

    >>> list(numbered([b"one\\n", b"two"]))
    [(1, b'one\\n'), (2, b'two')]
    """
    number = 0
    for line in Lines(lines, max_line_bytes):
        if line is not None:
            number += 1
            check_length(line, number, max_line_bytes)
            yield number, line


def check_length(line: bytes, number: int, max_line_bytes: int) -> None:
    """Raise InvalidLine if a line without its end is longer than `max_line_bytes`.

    >>> check_length(b"one\\n", 1, max_line_bytes=3)
    """
    if len(line) - line.endswith(b"\n") > max_line_bytes:
        raise InvalidLine(number, f"is longer than {max_line_bytes} bytes (max_line_bytes)")


def _parts_of_file(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """Yield lines, and a line that is longer than `limit` in parts."""
    size = limit + 1
    while part := file.readline(size):
        yield part
        is_cut = len(part) == size and not part.endswith(b"\n")
        size = SKIPPED_AT_A_TIME if is_cut else limit + 1


def _may_pause(file: object) -> bool:
    """True for an open stream of the system; a file on a disk does not pause."""
    if not isinstance(file, io.BufferedReader) or not hasattr(select, "poll"):
        return False
    try:
        return not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:  # it has no descriptor
        return False


def _parts_of_stream(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """Yield as `_parts_of_file` does, and None where complete lines were given and no more come.

    Only bytes that are in the buffer are read, so that nothing blocks but `peek`, while the buffer is empty.
    """
    poll = select.poll()
    poll.register(file.fileno(), select.POLLIN)
    is_blocking = os.get_blocking(file.fileno())
    kept: list[bytes] = []
    size, since = 0, 0.0
    while True:
        if since:
            wait = PAUSE_SECONDS if time.monotonic() - since < LONGEST_WAIT_SECONDS else 0
            if not poll.poll(1000 * wait):
                since = 0.0
                yield None
        if not is_blocking:
            poll.poll()
        left = len(file.peek(1))
        if not left:
            break
        while left:
            part = file.readline(left)
            left, size = left - len(part), size + len(part)
            kept.append(part)
            if part.endswith(b"\n") or size > limit:
                yield b"".join(kept)
                kept, size, since = [], 0, since or time.monotonic()
    if kept:
        yield b"".join(kept)
