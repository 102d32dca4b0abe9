"""Make bytes of scored rows, in the format that the output's name tells.

A row keeps its own bytes where the output has the input's format. Otherwise it is written anew from its fields. Knows
nothing of files: rows in, bytes out.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, Protocol

from cappy_engine.bulk.formats.compression import tables_for
from cappy_engine.bulk.formats.entries import Entry, ScoredRow
from cappy_engine.bulk.formats.file_format import Format
from cappy_engine.bulk.formats.json_lines import json_line
from cappy_engine.bulk.formats.table_rows import rows_of
from cappy_engine.bulk.tasks import Task
from cappy_engine.errors import CappyError

SPACES = b" \t\r\n"


class Writer(Protocol):
    """Makes bytes of rows; `begin` makes those before the first row.

    `problems` says by the places of entries which of them cannot be written, and why. It is called before they are
    scored, in their order; only others come to `rows`. Each is called once for every window of a file.
    """

    def begin(self) -> bytes: ...

    def problems(self, entries: Sequence[Entry]) -> Mapping[int, str]: ...

    def rows(self, rows: Sequence[ScoredRow]) -> bytes: ...


def writer_of(target: Format, source: Format, task: Task, header: Any) -> Writer:
    """Choose how rows of one format are written in another; `header` is the source's.

        >>> writer_of(Format("jsonl"), Format("jsonl"), ScoreTask(), b"").rows(rows)
        b'{"instruction": "Is the sky blue?", "response": "Yes", "score": 0.93}\\n'

    Raises CappyError if that is not possible.
    """
    if target.kind == "parquet":
        return TableWriter(task, header, source)
    if target.kind == "csv":
        if str(source) != str(target):
            raise CappyError(
                f"rows of {source} are not written as {target}; choose an output of the same format, or .jsonl"
            )
        return CsvWriter(task, header, target.delimiter)
    if source.kind == "parquet":
        from cappy_engine.bulk.formats import json_columns

        json_columns.check_json(header)
    return LineWriter(task, keeps_bytes=source.kind == "jsonl")


def needs_fields(target: Format, source: Format) -> bool:
    """Tell if rows of text are written anew from their fields.

    >>> needs_fields(Format("jsonl"), Format("csv"))
    True
    """
    return target.kind != source.kind


class LineWriter:
    """Writes JSON Lines. Marks are left out where there is nothing to mark."""

    def __init__(self, task: Task, *, keeps_bytes: bool) -> None:
        self._task = task
        self._keeps_bytes = keeps_bytes

    def begin(self) -> bytes:
        """Write nothing."""
        return b""

    def problems(self, entries: Sequence[Entry]) -> dict[int, str]:
        """Find rows of a table with values that JSON does not have."""
        listed = _by_batch(entries)
        if not listed:
            return {}
        from cappy_engine.bulk.formats import json_columns

        found: dict[int, str] = {}
        first = 0
        for batch, places in listed:
            problems = json_columns.json_problems_of(batch)
            found |= {first + each: problems[place] for each, place in enumerate(places) if place in problems}
            first += len(places)
        return found

    def rows(self, rows: Sequence[ScoredRow]) -> bytes:
        """Write rows, each in a line."""
        if self._keeps_bytes:
            return b"".join([_with_fields(row.entry.raw, self._added(row)) for row in rows])
        return b"".join(
            [
                json_line({**fields, **self._added(row)}, allow_nan=False)
                for row, fields in zip(rows, fields_of(rows), strict=True)
            ]
        )

    def _added(self, row: ScoredRow) -> dict[str, object]:
        found = self._task.results(row.entry.pairs, row.scores, row.truncated)
        return {name: value for name, value in found.items() if value is not False and value != []}


class CsvWriter:
    """Writes CSV: a record keeps its bytes, and gets more values at its end."""

    def __init__(self, task: Task, header: bytes, delimiter: str) -> None:
        self._task = task
        self._header = header
        self._delimiter = delimiter
        self._end = b"\r\n" if header.endswith(b"\r\n") else b"\n"

    def begin(self) -> bytes:
        """Write the names of all columns."""
        return self._longer(self._header, list(self._task.added))

    def problems(self, entries: Sequence[Entry]) -> dict[int, str]:
        """Find nothing: a record keeps its bytes."""
        return {}

    def rows(self, rows: Sequence[ScoredRow]) -> bytes:
        """Write records."""
        found = (self._task.results(row.entry.pairs, row.scores, row.truncated).values() for row in rows)
        return b"".join(
            [self._longer(row.entry.raw, list(map(_cell, values))) for row, values in zip(rows, found, strict=True)]
        )

    def _longer(self, record: bytes, values: list[str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=self._delimiter, lineterminator="").writerow(values)
        return b"%s%s%s%s" % (
            record.rstrip(b"\r\n"), self._delimiter.encode(), text.getvalue().encode(), self._end,
        )  # fmt: skip


class TableWriter:
    """Writes Arrow streams, of which a Parquet file is made at the end.

    `schema` is that of the rows as they were read. The window that tells the schema of rows of JSON leaves a stream
    also if none of its rows is good: a run that goes on behind it reads the schema there.
    """

    def __init__(self, task: Task, header: Any, source: Format) -> None:
        self._tables = tables_for("a Parquet file")
        from cappy_engine.bulk.formats import json_columns

        self._columns = json_columns
        self._task = task
        self._kind = source.kind
        self._asked = self._made = self._told_by = 0
        """How many windows came to `problems` and to `rows`, and which of them told the schema."""
        self.schema = header if source.kind == "parquet" else None
        if source.kind == "csv":
            text = io.StringIO(header.decode("utf-8-sig"), newline="")
            names = next(csv.reader(text, delimiter=source.delimiter))
            self.schema = self._tables.text_schema(names)

    def begin(self) -> bytes:
        """Write a stream without rows, which has the types of columns if they are known."""
        if self.schema is None:
            return b""
        return self._stream(self._tables.table_from([], self.schema), [])

    def go_on(self, file: BinaryIO, size: int) -> None:
        """Take the types of columns from the rows that an earlier run wrote."""
        if self.schema is None and size:
            self.schema = self._tables.without_columns(self._tables.first_schema(file), self._task.added)
            file.seek(size)

    def problems(self, entries: Sequence[Entry]) -> dict[int, str]:
        """Find rows of JSON that do not fit into the columns. The first rows tell what these are."""
        self._asked += 1
        if self._kind != "jsonl" or not entries:
            return {}
        fields = [entry.fields or {} for entry in entries]
        if self.schema is None:
            self.schema, self._told_by = self._columns.schema_of(fields), self._asked
        return self._columns.problems_of(fields, self.schema)

    def rows(self, rows: Sequence[ScoredRow]) -> bytes:
        """Write rows as a stream."""
        self._made += 1
        if not rows:
            return self.begin() if self._made == self._told_by else b""
        values = [self._task.results(row.entry.pairs, row.scores, row.truncated) for row in rows]
        if self._kind == "parquet":
            table = self._tables.table_from(_batches(rows), self.schema)
        else:
            table = self._columns.table_of([row.entry.fields or {} for row in rows], self.schema)
        return self._stream(table, values)

    def _stream(self, table: Any, values: Sequence[Mapping[str, object]]) -> bytes:
        return self._tables.stream_bytes(self._tables.with_columns(table, self._task.added, values))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PackedWriter:
    """Packs what a writer makes."""

    writer: Writer
    pack: Callable[[bytes], bytes]

    def begin(self) -> bytes:
        """Make what is written before the first row. A packed file has a packed part even without rows."""
        return self.pack(self.writer.begin())

    def go_on(self, file: BinaryIO, size: int) -> None:
        """Go on behind the first `size` bytes of a file, which an earlier run wrote."""
        if isinstance(self.writer, TableWriter):
            self.writer.go_on(file, size)

    def rows(self, rows: Sequence[ScoredRow]) -> bytes:
        """Make what is written of rows; nothing of none."""
        made = self.writer.rows(rows)
        return self.pack(made) if made else b""


def fields_of(rows: Sequence[ScoredRow]) -> list[dict[str, Any]]:
    """List the fields of rows, of a table or of text.

    >>> fields_of(rows)[0]["response"]
    'Yes'
    """
    if rows and rows[0].entry.fields is None:
        return [fields for batch in _batches(rows) for fields in rows_of(batch)]
    return [row.entry.fields or {} for row in rows]


def _batches(rows: Sequence[ScoredRow]) -> list[Any]:
    """Take the rows out of the batches that they came in."""
    tables = tables_for("a Parquet file")
    return [tables.keep_rows(batch, places) for batch, places in _by_batch([row.entry for row in rows])]


def _by_batch(entries: Sequence[Entry]) -> list[tuple[Any, list[int]]]:
    """List the batches that rows of a table came in, with their places there. Other rows have none."""
    of_tables = [entry.raw for entry in entries if isinstance(entry.raw, tuple)]
    groups = (list(group) for _, group in groupby(of_tables, key=lambda raw: id(raw[0])))
    return [(group[0][0], [place for _, place in group]) for group in groups]


def _cell(value: object) -> str:
    """Write a value for CSV: nothing for None, lists as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _with_fields(line: bytes, fields: Mapping[str, object]) -> bytes:
    """Put fields before the last brace of a row. The other bytes of the row stay as they are."""
    line = line.removeprefix(codecs.BOM_UTF8).rstrip(SPACES)
    begun = line[:-1].rstrip(SPACES)
    return b"%s, %s%s\n" % (begun, json_line(fields)[1:-2], line[len(begun) :])
