"""Write the server's log: lines for people, or JSON objects for a collector. A text of a request is never in it."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import queue
import select
import sys
import threading
import time

from cappy_engine.checks import printable
from cappy_engine.serving.server_options import LogFormat

FIELDS = "fields"
"""The attribute of a log record that holds more about it: names and numbers."""
MOST_LINES = 10_000
"""Lines that wait for a reader who does not read; what comes then is lost, and the next line tells how much."""
FLUSH_SECONDS = 0.5
"""How long the end of the process waits for the last lines."""


class JsonLines(logging.Formatter):
    """Writes each record as one JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record, with its fields and its traceback."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        line.update(getattr(record, FIELDS, {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """Writes a record for people: the level only where something is wrong."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record, with its fields and its traceback."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        fields = "".join(f" {name}={value}" for name, value in getattr(record, FIELDS, {}).items())
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{level}{printable(record.getMessage() + fields)}{trace}"


class LinesBeside(logging.Handler):
    """Writes records to a file descriptor from a thread of its own: nobody who logs waits for who reads the log."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0
        self._lines: queue.Queue[str] = queue.Queue(MOST_LINES)
        threading.Thread(target=self._write, name="log-of-cappy", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record to be written; it is lost if too many wait, or if it cannot be formatted."""
        try:
            line = self.format(record) + "\n"
            told = self.format(_told_lost(self._lost)) + "\n" if self._lost else ""
            self._lines.put_nowait(told + line)  # as one, or what is told would take the line's room
            self._lost = 0
        except Exception:
            self._lost += 1
            self.handleError(record)

    @property
    def is_behind(self) -> bool:
        """Tell if lines wait to be written."""
        return self._lines.unfinished_tasks > 0

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        ends = time.monotonic() + FLUSH_SECONDS
        while self.is_behind and time.monotonic() < ends:
            time.sleep(0.001)

    def _write(self) -> None:
        while True:
            left = self._lines.get().encode("utf-8", "backslashreplace")
            with contextlib.suppress(OSError):
                while left:
                    select.select([], [self._descriptor], [])  # who started us may have said that it never waits
                    left = left[os.write(self._descriptor, left) :]
            self._lines.task_done()


def _told_lost(count: int) -> logging.LogRecord:
    return logging.LogRecord(
        __name__, logging.WARNING, __file__, 0, "lines of this log that were lost: %d", (count,), None
    )


def is_written() -> bool:
    """Wait until the log is written, but not for long; tells if it is.

    >>> is_written()
    True
    """
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, LinesBeside)]
    for handler in handlers:
        handler.flush()
    return not any(handler.is_behind for handler in handlers)


def start_logging(form: LogFormat) -> None:
    """Send all logs of this process to stderr, from INFO on.

    A log that cannot be written, such as on a full disk or to a pipe that nobody reads, is lost: the server goes on.

        >>> start_logging("json")
    """
    logging.raiseExceptions = False
    handler = LinesBeside(sys.stderr.fileno())
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what one client does wrong is that client's to know
