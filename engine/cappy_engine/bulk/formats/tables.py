"""Read and write tables: Parquet files and Arrow streams; pack and unpack zstd.

A Parquet file cannot be appended to. While rows are made they are Arrow streams, one after another in one file, each a
complete one; `write_parquet_of` makes a Parquet file of them at the end. Only this and `json_columns` import pyarrow.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cappy_engine.bulk.formats.table_rows import gathered, shares_texts
from cappy_engine.errors import CappyError

ROWS_AT_A_TIME, BYTES_AT_A_TIME = 1024, 2**20
"""A batch that is read has at most so many rows; fewer, where rows are large: all of it is held as long as one row."""
FEW_ROWS = 32
"""So many are unpacked before their size is known: a text that many rows have may be in the file only once."""
BYTES_OF_PARTS = 96 * 2**20
"""Rows that become a batch take no more meanwhile, each few with a dictionary of its own."""
ROWS_OF_A_GROUP = 65_536
"""Rows of a group in what is written: few enough to be held in memory with texts of some kilobytes."""
BYTES_OF_A_GROUP = 64 * 2**20
FOOTER_END = 8
"""A Parquet file ends with the size of its footer, and PAR1."""

TYPES = {
    "float": pa.float32(),
    "bool": pa.bool_(),
    "int": pa.int32(),
    "text": pa.string(),
    "floats": pa.list_(pa.float32()),
    "ints": pa.list_(pa.int32()),
}
"""By the kinds of values that are added to rows."""

Batch = Any
"""A pyarrow.RecordBatch."""
Schema = Any
"""A pyarrow.Schema."""


class ParquetRows:
    """The rows of an open Parquet file. Raises CappyError, with the name, for a file that is not one or is damaged."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._open = file
        try:
            self._file = pq.ParquetFile(file, pre_buffer=False)
        except MemoryError as error:
            raise _shortage(path, "its footer") from error
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last one of the name of a column
            raise CappyError(f"{path} is not a complete Parquet file: {error}") from error
        self.schema: Schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.count: int = metadata.num_rows
        self.size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))

    def digest(self) -> str:
        """Make a digest of the footer, which has the places, sizes and bounds of values.

        So other rows mostly have another digest, and a file of gigabytes need not be read.

            >>> rows.digest()
            '1042 bytes, footer sha256 3f786850e387550f'
        """
        end = self._open.seek(-FOOTER_END, os.SEEK_END)
        size = int.from_bytes(self._open.read(FOOTER_END)[:4], "little")
        self._open.seek(end - size)
        footer = hashlib.sha256(self._open.read(size)).hexdigest()
        return f"{end + FOOTER_END} bytes, footer sha256 {footer[:16]}"

    def batches(self, start: int = 0) -> Iterator[tuple[int, Batch, int]]:
        """Yield, from row `start` on, a first row's number, its batch, a row's bytes.

        A batch ends with its row group. So it has the same rows, and a row the same size, wherever the reading begins.

            >>> [batch.num_rows for _, batch, _ in rows.batches()]
            [3]
        """
        first = 0
        try:
            for number in range(self._file.metadata.num_row_groups):
                group = self._file.metadata.row_group(number)
                if first + group.num_rows <= start or not group.num_rows:
                    first += group.num_rows
                    continue
                of_row = group.total_byte_size // group.num_rows + 1
                at_a_time = max(1, min(ROWS_AT_A_TIME, BYTES_AT_A_TIME // of_row))
                few = min(FEW_ROWS, at_a_time) if shares_texts(group) else at_a_time
                parts = self._file.iter_batches(few, row_groups=[number])
                for batch in map(_one_batch, gathered(parts, _sizes, (at_a_time, BYTES_AT_A_TIME, BYTES_OF_PARTS))):
                    skipped = min(batch.num_rows, max(0, start - first))
                    if skipped < batch.num_rows:
                        yield first + skipped, batch.slice(skipped), max(_sizes(batch)[1:]) // batch.num_rows
                    first += batch.num_rows
        except MemoryError as error:
            raise _shortage(self.path, f"the rows behind row {first}") from error
        except (OSError, pa.ArrowException) as error:
            raise CappyError(f"{self.path} is damaged behind row {first}: {error}") from error


def check_type(schema: Schema, name: str, path: Path, *, is_list: bool = False) -> None:
    """Raise CappyError unless a table's column holds texts, or lists of texts.

    >>> check_type(rows.schema, "response", Path("pairs.parquet"))
    """
    kind = schema.field(name).type
    inner = kind
    if is_list and _is_list(kind):
        inner = kind.value_type
    if (is_list and not _is_list(kind)) or not (_is_text(inner) or pa.types.is_null(inner)):
        wanted = "lists of texts" if is_list else "texts"
        raise CappyError(f"{path}: the column {name!r} holds {kind}, and must hold {wanted}")


def keep_rows(batch: Batch, places: Sequence[int]) -> Batch:
    """Keep the rows at some places of a batch. pyarrow's `take` does not know all types."""
    if len(places) == batch.num_rows:
        return batch
    runs = [list(run) for _, run in groupby(enumerate(places), lambda each: each[1] - each[0])]
    parts = [batch.slice(run[0][1], len(run)) for run in runs]
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def with_columns(table: Batch, kinds: Mapping[str, str], values: Sequence[Mapping[str, Any]]) -> Batch:
    """Put columns behind those of a table, with a value for every row. Their types are TYPES[kind].

    >>> with_columns(table, {"score": "float"}, [{"score": 0.93}]).column_names
    ['instruction', 'response', 'score']
    """
    for name, kind in kinds.items():
        column = pa.array([row.get(name) for row in values], TYPES[kind])
        table = table.append_column(pa.field(name, TYPES[kind]), column)
    return table


def table_from(batches: Sequence[Batch], schema: Schema) -> Batch:
    """Put batches into one table."""
    return pa.Table.from_batches(batches, schema)


def stream_bytes(table: Batch) -> bytes:
    """Write a table as a complete Arrow stream. A file may hold several, one after another.

    >>> len(stream_bytes(table)) > 0
    True
    """
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_streams(file: BinaryIO, size: int) -> Iterator[Batch]:
    """Yield the batches of all Arrow streams in the first `size` bytes of a file."""
    file.seek(0)
    while file.tell() < size:
        with pa.ipc.open_stream(file) as reader:
            yield from reader


def write_rows(rows: Iterator[Mapping[str, str]], path: Path) -> None:
    """Write rows of texts as a Parquet file, some at a time. The first one tells the columns.

    >>> write_rows(iter([{"instruction": "Is the sky blue?", "response": "Yes"}]), Path("pairs.parquet"))
    """
    first = next(rows)
    schema = text_schema(list(first))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        part: list[Mapping[str, str]] = [first]
        while part:
            writer.write_table(pa.Table.from_pylist(part, schema))
            part = list(islice(rows, ROWS_OF_A_GROUP))


def first_schema(file: BinaryIO) -> Schema:
    """Read the types of columns of the first Arrow stream in a file.

    >>> first_schema(open("scored.parquet.partial", "rb")).names
    ['instruction', 'response', 'score', 'score_truncated']
    """
    file.seek(0)
    with pa.ipc.open_stream(file) as reader:
        return reader.schema


def write_parquet_of(file: BinaryIO, size: int, out: BinaryIO) -> None:
    """Make a Parquet file of the Arrow streams in a file's first `size` bytes. Row groups have a bounded size.

    >>> write_parquet_of(open("scored.parquet.partial", "rb"), 4096, open("scored.parquet", "wb"))
    """
    schema = first_schema(file) if size else pa.schema([])
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        kept: list[Batch] = []
        rows = held = 0
        for batch in read_streams(file, size):
            kept.append(batch)
            rows, held = rows + batch.num_rows, held + _size(batch)
            if rows >= ROWS_OF_A_GROUP or held >= BYTES_OF_A_GROUP:
                writer.write_table(pa.Table.from_batches(kept, schema))
                kept, rows, held = [], 0, 0
        if kept:
            writer.write_table(pa.Table.from_batches(kept, schema))


def text_schema(names: Sequence[str]) -> Schema:
    """Make the schema of a table of texts."""
    return pa.schema([(name, pa.string()) for name in names])


def without_columns(schema: Schema, names: Collection[str]) -> Schema:
    """Leave columns out of a schema."""
    return pa.schema([each for each in schema if each.name not in names], schema.metadata)


def open_zstd(file: BinaryIO) -> BinaryIO:
    """Open a file of zstd frames, unpacked while it is read. Damage is an EOFError.

    >>> open_zstd(open("pairs.jsonl.zst", "rb")).readline()
    """
    return cast(BinaryIO, io.BufferedReader(_Zstd(file), 2**18))


def pack_zstd(content: bytes) -> bytes:
    """Pack with zstd, as one frame.

    >>> open_zstd(io.BytesIO(pack_zstd(b"one"))).read()
    b'one'
    """
    return cast(bytes, pa.compress(content, codec="zstd", asbytes=True))


class _Zstd(io.RawIOBase):
    """The unpacked bytes, for io.BufferedReader, which can read lines."""

    def __init__(self, file: BinaryIO) -> None:
        kept_open = SimpleNamespace(read=file.read, closed=False, close=lambda: None)
        self._stream = pa.CompressedInputStream(pa.PythonFile(kept_open, mode="r"), "zstd")

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        try:
            return cast(int, self._stream.readinto(buffer))
        except OSError as error:
            raise EOFError(str(error)) from error


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _one_batch(parts: Sequence[Batch]) -> Batch:
    return parts[0] if len(parts) == 1 else pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def _size(batch: Batch) -> int:
    return cast(int, batch.nbytes)


def _sizes(batch: Batch) -> tuple[int, int, int]:
    """Count a batch's rows, its bytes without shared texts, and its bytes as it is."""
    added = sum(_added_by(column) for column in batch.columns if pa.types.is_dictionary(column.type))
    return batch.num_rows, batch.nbytes + added, batch.nbytes


def _added_by(column: Any) -> int:
    if not _is_text(column.type):
        return 0  # it stays a dictionary wherever it is written
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return (pc.sum(lengths).as_py() or 0) - cast(int, column.dictionary.nbytes)


def _shortage(path: Path, what: str) -> OSError:
    return OSError(errno.ENOMEM, f"memory is too small for {what}; let this process have more", str(path))
