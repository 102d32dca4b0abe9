"""Read the rows of JSON Lines, CSV and Parquet, and tell the place behind each.

A file's name tells its format. Knows nothing of tokens or models.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.formats.compression import tables_for, unpacked
from cappy_engine.bulk.formats.csv_records import CsvRecords
from cappy_engine.bulk.formats.entries import (
    BLANK,
    Entry,
    Item,
    Position,
    Reading,
    Source,
    check_encoding,
    check_free,
    check_names,
    refused,
)
from cappy_engine.bulk.formats.file_format import Format, format_of
from cappy_engine.bulk.formats.json_lines import read_fields
from cappy_engine.bulk.formats.lines import SKIPPED_AT_A_TIME, Lines, check_length
from cappy_engine.bulk.formats.table_rows import values_of
from cappy_engine.errors import CappyError, InvalidLine
from cappy_engine.overlap import check_waited_for


@contextlib.contextmanager
def open_source(path: Path, reading: Reading) -> Iterator[Source]:
    """Open a file of rows by the format that its name tells.

        >>> with open_source(Path("pairs.csv"), Reading(ScoreTask())) as source:
        ...     rows = list(source.rows(Position()))

    Raises OSError if it cannot be read, and CappyError if it is damaged, or lacks a column that is needed.
    """
    with path.open("rb") as file, read_source(file, path, reading) as source:
        yield source


@contextlib.contextmanager
def read_source(file: BinaryIO, path: Path, reading: Reading) -> Iterator[Source]:
    """Read an open file as `open_source` does; `path` is its name.

    >>> with Path("pairs.csv").open("rb") as file, read_source(file, Path("pairs.csv"), reading) as source:
    ...     rows = list(source.rows(Position()))
    """
    form = format_of(path)
    if form.kind == "parquet":
        yield TableSource(path, file, reading)
        return
    total = os.fstat(file.fileno()).st_size or None
    with unpacked(file, path) as lines:
        done = file.tell if form.packing else None
        if form.kind == "csv":
            yield CsvSource(path, lines, reading, form, done=done, total=total)
        else:
            yield LineSource(lines, reading, done=done, total=total)


class LineSource:
    """The rows of JSON Lines: of an open file, a stream, or any iterable of lines."""

    header = b""
    columns = ()

    def __init__(
        self,
        lines: Iterable[bytes],
        reading: Reading,
        *,
        done: Callable[[], int] | None = None,
        total: int | None = None,
    ) -> None:
        self.total = total
        self._lines = lines
        self._reading = reading
        self._done = done
        self._source = Lines(lines, reading.max_line_bytes)
        self.lines = 0
        self._start = 0

    def position(self) -> Position | None:
        """Tell where the next row begins. None within a line that was too long to be read."""
        offset = self._start + self._source.bytes_read
        return None if self._source.is_within else Position(offset, self.lines, self._done() if self._done else offset)

    def pass_over(self) -> None:
        """Go to the end of a line that was too long."""
        self._source.pass_over()

    def rows(self, start: Position) -> Iterator[Item]:
        """Yield rows from `start` on."""
        skip(self._lines, start.offset)
        self._start, self.lines = start.offset, start.number
        limit = self._reading.max_line_bytes
        for line in self._source:
            if line is None:
                yield None
                continue
            self.lines += 1
            if self.lines == 1:
                check_encoding(line)
            try:
                check_length(line, self.lines, limit)
                entry = self._read(line)
            except InvalidLine as error:
                yield refused(error, line, limit)
                continue
            yield BLANK if entry is None else entry

    def _read(self, line: bytes) -> Entry | None:
        task, number = self._reading.task, self.lines
        fields = read_fields(line, number, task.texts, keeps_all=self._reading.keeps_fields, others=task.lists)
        if fields is None:
            return None
        check_free(fields, task, number)
        pairs = task.pairs(fields, number, "line")
        return Entry(number, pairs, line, len(line), fields if self._reading.keeps_fields else None)


class CsvSource:
    """The rows of CSV, whose first record names the columns."""

    def __init__(
        self, path: Path, lines: BinaryIO, reading: Reading, form: Format, *,
        done: Callable[[], int] | None = None, total: int | None = None,
    ) -> None:  # fmt: skip
        self.total = total
        self._lines = lines
        self._reading = reading
        self._done = done
        self._records = CsvRecords(lines, delimiter=form.delimiter, max_record_bytes=reading.max_line_bytes)
        try:
            names = next(self._records, None)
        except InvalidLine as error:
            check_encoding(self._records.raw)
            raise CappyError(f"{path}, {error}") from error
        if not names:
            raise CappyError(f"{path} has no first line with the names of its columns")
        self.columns: list[str] = names
        self.header = self._records.raw
        check_names(names, reading, path)

    @property
    def lines(self) -> int:
        """Count the lines that were read."""
        return self._records.line

    def position(self) -> Position | None:
        """Tell where the next record begins. None within a line that was too long to be read."""
        offset = self._records.offset
        if offset is None:
            return None
        return Position(offset, self._records.line, self._done() if self._done else offset)

    def pass_over(self) -> None:
        """Go to the end of a line that was too long."""
        self._records.pass_over()

    def rows(self, start: Position) -> Iterator[Item]:
        """Yield rows from `start` on."""
        records, names = self._records, self.columns
        if start.offset:
            skip(self._lines, start.offset - len(self.header))
            records.go_on(start.offset, start.number)
        while True:
            try:
                record = next(records, None)
                if record is None:
                    return
                number = records.first_line
                if not record:
                    yield BLANK
                    continue
                if len(record) != len(names):
                    raise InvalidLine(
                        number, f"has {len(record)} values, and the first line names {len(names)} columns"
                    )
                fields = dict(zip(names, record, strict=True))
                pairs = self._reading.task.pairs(fields, number, "line")
            except InvalidLine as error:
                yield records.refusal(error, self._reading.max_line_bytes)
                continue
            yield Entry(number, pairs, records.raw, len(records.raw), fields if self._reading.keeps_fields else None)


class TableSource:
    """The rows of a Parquet file, up to row `end` if it is given."""

    def __init__(self, path: Path, file: BinaryIO, reading: Reading, *, end: int | None = None) -> None:
        tables = tables_for(path)
        self._rows = tables.ParquetRows(path, file)
        self._end = self._rows.count if end is None else end
        self._task = reading.task
        self.lines = 0
        self.header = self.columns = self._rows.schema
        self.total: int | None = self._rows.count
        check_names(self.header.names, reading, path)
        for name in reading.task.texts:
            tables.check_type(self.header, name, path)
        for name in reading.task.lists:
            tables.check_type(self.header, name, path, is_list=True)

    @property
    def size(self) -> int:
        """Count the bytes of all rows, unpacked."""
        return int(self._rows.size)

    def digest(self) -> str:
        """Make a digest of the file's footer. Its rows are not read."""
        return str(self._rows.digest())

    def position(self) -> Position:
        """Tell how many rows were read."""
        return Position(self.lines, self.lines, self.lines)

    def pass_over(self) -> None:
        """Do nothing: a row is always read to its end."""

    def rows(self, start: Position) -> Iterator[Item]:
        """Yield rows from `start` on."""
        names = (*self._task.texts, *self._task.lists)
        for first, whole, held in self._rows.batches(start.offset):
            if first >= self._end:
                return
            batch = whole.slice(0, self._end - first)
            columns = [values_of(batch, name) for name in names]
            for place, values in enumerate(zip(*columns, strict=True)):
                self.lines = first + place + 1
                try:
                    pairs = self._task.pairs(dict(zip(names, values, strict=True)), self.lines, "row")
                except InvalidLine as error:
                    yield refused(error, b"", 0)
                    continue
                size = sum(len(text) for pair in pairs for text in pair)
                yield Entry(self.lines, pairs, (batch, place), size + held)


def skip(lines: Iterable[bytes], size: int) -> None:
    """Pass over bytes of an open file, which may be packed.

    >>> skip(io.BytesIO(b"one"), 2)
    """
    if not size:
        return
    file: Any = lines
    if file.seekable() and not isinstance(file, gzip.GzipFile):  # which would unpack all that is skipped at once
        file.seek(size, os.SEEK_CUR)
        return
    while size and (part := file.read(min(size, SKIPPED_AT_A_TIME))):
        check_waited_for()
        size -= len(part)
