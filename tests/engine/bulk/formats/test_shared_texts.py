"""A Parquet file may have a text once that thousands of rows have. Memory is bounded by what they hold unpacked."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.formats.entries import Entry, Position, Reading
from cappy_engine.bulk.formats.sources import open_source
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.errors import CappyError
from tests.support.bulk_files import pairs_of, run, write_rows

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LONG = "x" * 100_000
ROWS = 2000
MOST_BYTES = 8 * 2**20
"""Of all rows together it is some 200 MB."""


def texts(number: int = ROWS) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array([LONG]))


def lists() -> Any:
    return pa.ListArray.from_arrays(list(range(ROWS + 1)), texts().cast(pa.string()))


def late() -> Any:
    """Short texts first, so that nothing tells early what comes."""
    return pa.concat_arrays([pa.array([str(number) for number in range(1500)]), pa.array([LONG] * (ROWS - 1500))])


KINDS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "a text": ("response", texts, {"store_schema": False}),
    "a text that is a dictionary in Arrow, too": ("response", texts, {}),
    "a text of late rows": ("response", late, {}),
    "a prefix": ("response", late, {"use_dictionary": False, "column_encoding": {"response": "DELTA_BYTE_ARRAY"}}),
    "a text of another column": ("note", lambda: texts().cast(pa.string()), {}),
    "a text in lists": ("candidates", lists, {}),
}


def shared(path: Path, kind: str) -> Path:
    """Write a small file with one row group, whose rows have one long text."""
    name, column, options = KINDS[kind]
    columns = {"instruction": ["q"] * ROWS, "response": ["a"] * ROWS, name: column()}
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=ROWS, **options)
    return path


def entries_of(path: Path, name: str, start: Position | None = None) -> Iterator[Entry]:
    task = RankTask() if name == "candidates" else ScoreTask()
    with open_source(path, Reading(task)) as source:
        for row in source.rows(start or Position()):
            assert isinstance(row, Entry)
            yield row


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_are_unpacked_at_once_where_they_share_a_text(kind: str, tmp_path: Path) -> None:
    name = KINDS[kind][0]
    source, count, seen = shared(tmp_path / "in.parquet", kind), 0, None
    assert source.stat().st_size < 100_000
    for entry in entries_of(source, name):
        batch, count = entry.raw[0], count + 1
        if batch is not seen:
            seen = batch
            values = [each if isinstance(each, str) else "".join(each) for each in batch[name].to_pylist()]
            assert sum(map(len, values)) + batch.nbytes <= MOST_BYTES
            assert batch.num_rows * entry.size >= sum(map(len, values)), "the size of a row"
    assert count == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_share_a_text_have_the_same_sizes_wherever_the_reading_begins(kind: str, tmp_path: Path) -> None:
    source, name = shared(tmp_path / "in.parquet", kind), KINDS[kind][0]
    sizes = [entry.size for entry in entries_of(source, name)]
    for start in (7, 1000, 1999):
        assert [entry.size for entry in entries_of(source, name, Position(start, start, start))] == sizes[start:]


def test_ordinary_rows_come_many_at_a_time(tmp_path: Path) -> None:
    rows = [{"instruction": "Is it so?", "response": f"yes {number}"} for number in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    batches = list(dict.fromkeys(entry.raw[0].num_rows for entry in entries_of(tmp_path / "in.parquet", "response")))
    assert batches == [1024, 452]


# What is not the file's fault, and what is


@pytest.mark.parametrize(("name", "what"), [("iter_batches", "the rows behind row 0"), ("__init__", "its footer")])
def test_a_shortage_of_memory_is_not_called_damage(
    name: str, what: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.parquet", pairs_of(3))

    def refuse(*args: object, **options: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 1073741824 failed")

    monkeypatch.setattr(pq.ParquetFile, name, refuse)
    with pytest.raises(OSError, match=f"memory is too small for {what}; let this process have more") as caught:
        run(scorer, source, tmp_path / "out.parquet")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOMEM, str(source))


def test_a_name_of_a_column_that_is_not_utf_8_is_damage_of_the_file(tmp_path: Path, scorer: Scorer) -> None:
    source = tmp_path / "in.parquet"
    columns = {"instruction": ["q"], "response": ["a"], "a name": ["b"]}
    pq.write_table(pa.table(columns), source, store_schema=False)
    source.write_bytes(source.read_bytes().replace(b"a name", b"\xff name"))
    with pytest.raises(CappyError, match=r"in\.parquet is not a complete Parquet file: .*0xff"):
        run(scorer, source, tmp_path / "out.parquet")
