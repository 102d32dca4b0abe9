"""Lines of the log for people: one for each event, with its level where something is wrong, and nothing that steers."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

import pytest

from cappy_engine.serving.logs import FIELDS, MOST_LINES, LinesBeside, TextLines
from tests.support.gated import SECONDS


def record_of(message: str, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("cappy.server", level, "file", 1, message, (), None)
    setattr(made, FIELDS, fields)
    return made


@pytest.mark.parametrize(
    ("level", "line"),
    [
        (logging.INFO, "request route=/v1/rank status=200 ms=1.5"),
        (logging.WARNING, "WARNING: request route=/v1/rank status=200 ms=1.5"),
        (logging.ERROR, "ERROR: request route=/v1/rank status=200 ms=1.5"),
    ],
)
def test_a_line_for_people_has_its_level_where_something_is_wrong_and_its_fields(level: int, line: str) -> None:
    assert TextLines().format(record_of("request", level, route="/v1/rank", status=200, ms=1.5)) == line


def test_a_line_for_people_is_one_line_that_does_not_steer_a_terminal() -> None:
    line = TextLines().format(record_of("the bundle \x1b[31m\nERROR: all is lost", path="a\rb"))
    assert line == "the bundle ·[31m·ERROR: all is lost path=a·b"


def test_a_line_for_people_has_the_traceback_behind_it() -> None:
    record = record_of("a step failed", logging.ERROR)
    try:
        raise KeyError("mistake")
    except KeyError:
        record.exc_info = sys.exc_info()
    assert TextLines().format(record).startswith("ERROR: a step failed\nTraceback")
    assert TextLines().format(record).endswith("KeyError: 'mistake'")


def test_a_record_that_cannot_be_written_is_no_error_of_who_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    reader, writer = os.pipe()
    handler = LinesBeside(writer)
    handler.handle(logging.LogRecord("other", logging.INFO, "file", 1, "%d things", ("x",), None))
    handler.handle(record_of("the server goes on"))
    handler.handle(record_of("for long"))
    while handler.is_behind:
        time.sleep(0.001)
    assert os.read(reader, 100) == b"lines of this log that were lost: 1\nthe server goes on\nfor long\n"


def test_lines_wait_for_a_reader_also_where_the_pipe_does_not() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler, lines = LinesBeside(writer), [f"{number} {'x' * 500}" for number in range(500)]
    for line in lines:
        handler.handle(record_of(line))
    with os.fdopen(reader) as file:
        assert [next(file) for _ in lines] == [f"{line}\n" for line in lines]


def test_lines_are_lost_and_nobody_waits_where_a_reader_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    handler, line = LinesBeside(writer), record_of("x" * 999)
    all_told = threading.Event()

    def tell() -> None:
        for _ in range(MOST_LINES + 4000):
            handler.handle(line)
        all_told.set()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    nobody_waits = all_told.wait(SECONDS)
    told = b""
    with os.fdopen(reader, "rb", 0) as file:
        while teller.is_alive() or handler.is_behind:
            told += file.read() or b""
        handler.handle(record_of("read again"))
        while handler.is_behind:
            time.sleep(0.001)
        told += file.read() or b""
    assert nobody_waits
    lines = told.decode().splitlines()
    count = lines.count("x" * 999)
    assert MOST_LINES <= count < MOST_LINES + 3000  # the pipe itself holds some lines, too
    lost = [int(line.removeprefix("lines of this log that were lost: ")) for line in lines if line.startswith("lines")]
    assert (count + sum(lost), lines[-1]) == (MOST_LINES + 4000, "read again")


def test_who_reads_slowly_reads_lines_and_not_only_that_some_were_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr("cappy_engine.serving.logs.MOST_LINES", 2)
    monkeypatch.setattr(LinesBeside, "_write", lambda handler: None)
    handler = LinesBeside(2)
    for number in range(4):
        handler.handle(record_of(f"line {number}"))
    waiting = handler._lines
    read = [waiting.get()]
    handler.handle(record_of("line 4"))
    read += [waiting.get(), waiting.get()]
    assert read == ["line 0\n", "line 1\n", "lines of this log that were lost: 2\nline 4\n"]
