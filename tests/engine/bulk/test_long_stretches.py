"""Nothing that a file may have makes a run go on for long without a mark, or after it was told to end."""

from __future__ import annotations

import gzip
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk import windows
from cappy_engine.bulk.formats.entries import Position, Reading
from cappy_engine.bulk.formats.sources import LineSource, open_source, skip
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.overlap import ahead
from tests.support.bulk_files import WINDOW, pairs_of, run, stopped, write_rows

FORMATS = ["jsonl", "csv", "jsonl.gz"]
BLANK_LINES = [0, 12, 4, 5, 17]
MOST = 5


def with_blank_lines(path: Path) -> Path:
    """Write rows with so many blank lines before each, and behind the last one."""
    lines = write_rows(path.with_name("plain." + path.name.removesuffix(".gz")), pairs_of(4)).read_bytes()
    header, rows = lines.splitlines(keepends=True)[:-4], lines.splitlines(keepends=True)[-4:]
    content = b"".join([*header, *(b"\n" * count + row for count, row in zip(BLANK_LINES, [*rows, b""], strict=True))])
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def shapes(path: Path, start: Position) -> list[tuple[int, int, Position]]:
    with open_source(path, Reading(ScoreTask())) as source:
        found = list(windows.windows(source, start, most_pairs=2, stops=False))
    return [(len(each.entries), each.blank_lines, each.end) for each in found]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MOST_BLANK_LINES", MOST)


@pytest.mark.parametrize("form", FORMATS)
def test_windows_end_behind_so_many_blank_lines(form: str, tmp_path: Path) -> None:
    source = with_blank_lines(tmp_path / f"in.{form}")
    found = shapes(source, Position())
    assert [shape[:2] for shape in found] == [(1, 5), (0, 5), (1, 5), (1, 5), (1, 5), (0, 5), (0, 5), (0, 3)]
    for place, (_, _, end) in enumerate(found):
        assert shapes(source, end) == found[place + 1 :]


@pytest.mark.parametrize("into", ["same", "parquet"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_that_was_stopped_among_blank_lines_goes_on_to_the_same_bytes(
    form: str, into: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if into == "parquet":
        pytest.importorskip("pyarrow")
    source, end = with_blank_lines(tmp_path / f"in.{form}"), form if into == "same" else into
    out, whole = tmp_path / f"out.{end}", tmp_path / f"whole.{end}"
    totals = run(scorer, source, whole)
    assert (totals.pairs, totals.blank_lines) == (4, sum(BLANK_LINES))
    for commits in range(1, 9):
        stopped(monkeypatch, commits, lambda: run(scorer, source, out))
        totals = run(scorer, source, out, resume=True)
        assert (totals.pairs, totals.blank_lines) == (4, sum(BLANK_LINES))
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()


def test_no_window_of_ordinary_rows_ends_at_a_blank_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    source = with_blank_lines(tmp_path / "in.jsonl")
    assert [shape[:2] for shape in shapes(source, Position())] == [(2, 12), (2, 9), (0, 17)]


# The end of a run within a long line


class Endless(io.RawIOBase):
    """A line that ends when somebody gives up, as one of gigabytes would."""

    def __init__(self) -> None:
        self.is_given_up = threading.Event()
        self.is_long = threading.Event()
        self._left = 200

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._left -= 1
        if self._left < 0:
            self.is_long.set()
        size = 0 if self.is_given_up.is_set() else len(buffer)
        buffer[:size] = b"x" * size
        return size


@pytest.mark.parametrize("is_last", [False, True])
def test_who_reads_ahead_ends_within_a_line_without_end(is_last: bool) -> None:
    """With `is_last` it ends a window, whose end is looked for."""
    endless, most_pairs = Endless(), 1 if is_last else WINDOW
    giving_up = threading.Timer(20, endless.is_given_up.set)
    giving_up.start()
    source = LineSource(io.BufferedReader(endless), Reading(ScoreTask(), max_line_bytes=100))
    with ahead(windows.windows(source, Position(), most_pairs=most_pairs, stops=False)):
        assert endless.is_long.wait(20)
    giving_up.cancel()
    assert not endless.is_given_up.is_set()


def test_who_reads_ahead_ends_while_it_skips_what_an_earlier_run_read() -> None:
    endless = Endless()
    giving_up = threading.Timer(20, endless.is_given_up.set)
    giving_up.start()

    def items() -> Iterator[int]:
        skip(io.BufferedReader(endless), 2**60)
        yield 1

    with ahead(items()):
        assert endless.is_long.wait(20)
    giving_up.cancel()
    assert not endless.is_given_up.is_set()


@pytest.mark.parametrize("form", ["jsonl.gz", "csv.gz"])
def test_a_run_goes_on_behind_the_middle_of_a_packed_file(
    form: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = write_rows(tmp_path / f"in.{form}", pairs_of(60)), RowOptions(window=WINDOW)
    out, whole = tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    run(scorer, source, whole, options=options)
    stopped(monkeypatch, 4, lambda: run(scorer, source, out, options=options))
    assert run(scorer, source, out, options=options, resume=True).pairs_before == 32 - WINDOW
    assert out.read_bytes() == whole.read_bytes()
