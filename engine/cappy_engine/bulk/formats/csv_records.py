"""Read records of CSV, each with its own bytes. Knows nothing of columns or pairs."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

from cappy_engine.bulk.formats.entries import Refused, refused
from cappy_engine.bulk.formats.lines import Lines
from cappy_engine.errors import InvalidLine


class CsvRecords:
    """Iterates over records; a value in quotes may hold line breaks.

    After each, also after an error: `raw` is the record's bytes, `first_line` the number of its first line, and `line`
    counts the lines that were read. Raises InvalidLine for a record that is not CSV in UTF-8, or
    longer than `max_record_bytes` without its end; then the next one begins at the next line. Raises the limit of a
    field's size that the module `csv` has for the whole process, if it is lower.

        >>> next(CsvRecords(io.BytesIO(b'a,"b"'), delimiter=",", max_record_bytes=100))
        ['a', 'b']
    """

    def __init__(self, file: BinaryIO, *, delimiter: str, max_record_bytes: int) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), max_record_bytes))  # the module has one limit for all
        self.line = self.first_line = 0
        self._limit = max_record_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._start = 0
        self._source = Lines(file, max_record_bytes)
        self._lines = iter(self._source)
        self._reader = csv.reader(_Texts(self), delimiter=delimiter, strict=True)

    @property
    def raw(self) -> bytes:
        """Give the bytes of the last record."""
        return b"".join(self._parts)

    @property
    def offset(self) -> int | None:
        """Count the bytes that were read. None within a line that was too long to be read."""
        return None if self._source.is_within else self._start + self._source.bytes_read

    def pass_over(self) -> None:
        """Go to the end of a line that was too long."""
        self._source.pass_over()

    def refusal(self, error: InvalidLine, most_bytes: int) -> Refused:
        """Refuse the last record. Of one that has several lines, all are told: an open quote takes many with it."""
        lines = self.line - self.first_line + 1
        told = f" (lines {self.first_line} to {self.line})" if lines > 1 else ""
        named = InvalidLine(error.number, f"{error.problem}{told}", error.unit)
        return dataclasses.replace(refused(named, self.raw, most_bytes), lines=lines)

    def go_on(self, offset: int, line: int) -> None:
        """Count from another place of the file, where it was set to."""
        self._start, self.line = offset - self._source.bytes_read, line

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        self._parts, self._size, self.first_line = [], 0, self.line + 1
        try:
            return next(self._reader)
        except csv.Error as error:
            raise InvalidLine(self.first_line, _problem(str(error))) from error

    def next_text(self) -> str:
        """Read one line, for the parser of records."""
        line = next(self._lines)
        if line is None:  # a file does not pause
            return self.next_text()
        self.line += 1
        self._size += len(line)
        self._parts.append(line)
        if self._size - line.endswith(b"\n") > self._limit:
            self._parts = [self.raw[: self._limit + 1]]
            hint = "; is a quote not closed?" if self.line > self.first_line else ""
            raise InvalidLine(self.first_line, f"is longer than {self._limit} bytes (max_line_bytes){hint}")
        try:
            return line.decode("utf-8-sig" if self.line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidLine(self.line, f"not UTF-8 (byte {error.start}: 0x{line[error.start]:02x})") from error


def _problem(found: str) -> str:
    """Say what is wrong, and what may mend it: the parser speaks of Python's files."""
    if found.startswith("new-line character"):
        return "not CSV (a carriage return alone, outside of quotes); lines end with \\n or \\r\\n"
    return f"not CSV ({found}){'; is a quote not closed?' * (found == 'unexpected end of data')}"


class _Texts:
    """Lines as texts, for the parser; one that raised goes on, as a generator would not."""

    def __init__(self, records: CsvRecords) -> None:
        self._records = records

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._records.next_text()
