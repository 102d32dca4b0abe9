"""Write the server's log: lines for people, or JSON objects for a collector. A text of a request is never in it."""

from __future__ import annotations

import datetime
import json
import logging

from cappy_engine.checks import printable
from cappy_engine.serving.server_options import LogFormat

FIELDS = "fields"
"""The attribute of a log record that holds more about it: names and numbers."""


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


def start_logging(form: LogFormat) -> None:
    """Send all logs of this process to stderr, from INFO on.

    A log that cannot be written, such as on a full disk, is lost: the server goes on.

        >>> start_logging("json")
    """
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what one client does wrong is that client's to know
