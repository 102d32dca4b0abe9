"""Windows hold a bounded part of the input, whatever rows it has, and end at the same rows wherever they begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk import windows
from cappy_engine.bulk.formats import entries
from cappy_engine.bulk.formats.entries import Position, Reading
from cappy_engine.bulk.formats.sources import open_source
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.windows import Window
from tests.support.bulk_files import pairs_of, run, write_rows

LIMIT = 100
LONG_ROWS = 20


def windows_of(path: Path, start: Position | None = None, *, most_pairs: int = 1000) -> list[Window]:
    with open_source(path, Reading(ScoreTask(), LIMIT)) as source:
        return list(windows.windows(source, start or Position(), most_pairs=most_pairs, stops=False))


def shape_of(found: list[Window]) -> list[tuple[int, int, list[int]]]:
    """Where windows end, and which rows are refused in them."""
    return [(each.end.offset, each.end.number, [bad.error.number for bad in each.refused]) for each in found]


def long_rows(path: Path) -> Path:
    """Write rows that are too long, one after another, between two good ones."""
    good, bad = pairs_of(2), {"id": "x" * 3 * LIMIT, "instruction": "q", "response": "a"}
    return write_rows(path, [good[0], *[bad] * LONG_ROWS, good[1]])


@pytest.mark.parametrize("form", ["jsonl", "csv", "jsonl.gz"])
def test_rows_that_are_too_long_do_not_fill_a_window(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_BYTES", 5 * LIMIT)
    source = long_rows(tmp_path / f"in.{form}")
    found = windows_of(source)
    assert max(len(window.refused) for window in found) <= 5
    assert sum(len(window.refused) for window in found) == LONG_ROWS
    for place, window in enumerate(found[:-1]):
        assert shape_of(windows_of(source, window.end)) == shape_of(found[place + 1 :])


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_windows_end_behind_so_many_rows_that_are_too_long(form: str, tmp_path: Path) -> None:
    found = windows_of(long_rows(tmp_path / f"in.{form}"), most_pairs=4)
    assert [len(window.entries) + len(window.refused) for window in found] == [4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_of_a_row_that_is_too_long_only_the_beginning_is_kept(
    form: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "MOST_KEPT_BYTES", 20)
    source, bad = long_rows(tmp_path / f"in.{form}"), tmp_path / "bad.jsonl"
    options = RowOptions("skip", max_line_bytes=LIMIT)
    run(scorer, source, tmp_path / f"out.{form}", options=options, rejects=bad)
    rejects = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [len(each["text"]) for each in rejects] == [20] * LONG_ROWS
    assert [each["line"] for each in rejects] == list(range(2 + (form == "csv"), 2 + (form == "csv") + LONG_ROWS))


def test_errors_of_refused_rows_do_not_hold_the_rows(tmp_path: Path) -> None:
    for line in (b'{"instruction": "\xff"}', b'{"instruction": ', b"x" * 2 * LIMIT):
        (tmp_path / "in.jsonl").write_bytes(line)
        [refused] = windows_of(tmp_path / "in.jsonl")[0].refused
        assert (refused.error.__traceback__, refused.error.__cause__, refused.error.__context__) == (None,) * 3


# Parquet


def wide_table(path: Path, rows: int, column: Any, **options: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"{number}" for number in range(rows)]
    pq.write_table(pa.table({"instruction": texts, "response": texts, "wide": column}), path, **options)
    return path


def test_other_columns_of_parquet_count_in_the_size_of_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = wide_table(tmp_path / "in.parquet", 100, [bytes([number]) * 1000 for number in range(100)])
    monkeypatch.setattr(windows, "WINDOW_BYTES", 10_000)
    assert [len(window.entries) for window in windows_of(source)] == [10] * 10


def test_batches_of_large_rows_are_small(tmp_path: Path) -> None:
    from cappy_engine.bulk.formats import tables

    source = wide_table(tmp_path / "in.parquet", 40, [bytes([number]) * 2**17 for number in range(40)])
    with source.open("rb") as file:
        found = list(tables.ParquetRows(source, file).batches())
    assert max(batch.num_rows for _, batch, _ in found) <= 8
    assert [first for first, _, _ in found][:3] == [0, found[0][1].num_rows, 2 * found[0][1].num_rows]


def test_windows_of_parquet_end_at_the_same_rows_wherever_the_reading_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = [bytes(number * 37 % 400) for number in range(60)]
    source = wide_table(tmp_path / "in.parquet", 60, column, row_group_size=25)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 1000)
    found = windows_of(source)
    assert len(found) > 9
    for place, window in enumerate(found[:-1]):
        assert [each.end for each in windows_of(source, window.end)] == [each.end for each in found[place + 1 :]]
