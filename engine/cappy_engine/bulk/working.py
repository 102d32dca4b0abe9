"""Take windows of rows through the scorer, and make of them the bytes that are written."""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.entries import Position, Reading, Refused
from cappy_engine.bulk.formats import Format, format_of
from cappy_engine.bulk.jsonl import json_line
from cappy_engine.bulk.packing import DAMAGES, damage
from cappy_engine.bulk.row_options import FILE_WINDOW_PAIRS, Progress, RowOptions, Totals
from cappy_engine.bulk.sources import read_source
from cappy_engine.bulk.tasks import Task
from cappy_engine.bulk.windows import ScoredRow, Window, encode, score, windows, without
from cappy_engine.bulk.writing import Writer
from cappy_engine.errors import CappyError, InvalidLine
from cappy_engine.scorer import Scorer

BATCHES_OF_A_WINDOW = 16
"""A window has at least as many pairs as fill so many batches, of 32 tokens each: large batches need more to choose
from."""
MOST_LISTED = 1000
"""Refused rows that are listed in `Totals.skipped`; all are counted."""

State = tuple[int, ...]
"""What tells that a file is the same, and was not written to: its place, size and time; empty for a pipe."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """Files to read one after another, and what is done with their rows; errors name the file if they `are_named`.

    >>> Files([Path("a.csv"), Path("b.csv")], ScoreTask()).format.kind
    'csv'
    """

    paths: Sequence[Path]
    task: Task
    options: RowOptions = field(default_factory=RowOptions)
    are_named: bool = False

    def name(self, path: Path) -> str:
        """Give the name that errors of a file's rows begin with: none, if it is the only one."""
        return str(path) if self.are_named or len(self.paths) > 1 else ""

    @property
    def format(self) -> Format:
        """Tell the format of all of them. Raises CappyError if they have several."""
        formats = dict.fromkeys(str(format_of(path)) for path in self.paths)
        if len(formats) > 1:
            found = " and ".join(formats)
            raise CappyError(f"the inputs have several formats, {found}; give those of one format at a time")
        return format_of(self.paths[0])

    def size(self) -> int:
        """Count the bytes of all files, packed as they are."""
        return sum(path.stat().st_size for path in self.paths)

    def states(self) -> list[State]:
        """Note how all files are, before they are read; `FileWindows` tells if one has changed since."""
        return [state_of(path.stat()) for path in self.paths]


def most_pairs_of(scorer: Scorer, options: RowOptions) -> int:
    """Tell how many pairs of a file make a window: by the largest batch, not by how fast this machine is.

    >>> most_pairs_of(scorer, RowOptions())
    2048
    """
    by_batches = BATCHES_OF_A_WINDOW * scorer.runner.grouping.max_batch_tokens // 32
    return options.window or max(FILE_WINDOW_PAIRS, by_batches)


@dataclass(frozen=True)
class FileWindows:
    """Makes tokenised windows of files from a position on; a window ends with its file.

    The `writer` says which rows it cannot write, so that they are refused before they are scored. `states` are those of
    the files when the run began.
    """

    scorer: Scorer
    files: Files
    reading: Reading
    columns: Any
    most_pairs: int
    writer: Writer
    states: Sequence[State]

    def since(self, start: Position) -> Iterator[Window]:
        """Yield windows. Raises CappyError for a file that has not the columns of the first one, or that changes.

        >>> [len(window.entries) for window in file_windows.since(Position())]
        [7]
        """
        done = 0
        for place, path in enumerate(self.files.paths):
            size = path.stat().st_size
            if place >= start.file:
                begin = start if place == start.file else Position()
                for window in self._unchanged(path, begin, self.states[place]):
                    part = size * window.end.done // (window.total or 1) if window.total else size
                    end = dataclasses.replace(window.end, file=place)
                    yield dataclasses.replace(window, end=end, bytes_done=done + part)
            done += size

    def _unchanged(self, path: Path, begin: Position, state: State) -> Iterator[Window]:
        """Yield the windows of a file, none of which was read behind a change; a pipe has no state to compare."""
        with path.open("rb") as file:  # once: another file may get the name at any time

            def check() -> None:
                if state:
                    check_unchanged(file, path, state)

            check()
            try:
                for window in self._of_file(file, path, begin):
                    check()
                    yield window
            except Exception:  # a change may be what it comes from
                check()
                raise
            check()

    def _of_file(self, file: BinaryIO, path: Path, begin: Position) -> Iterator[Window]:
        options = self.files.options
        with read_source(file, path, self.reading) as source:
            if source.columns != self.columns:
                raise CappyError(f"{path} has other columns than {self.files.paths[0]}; give it alone")
            for window in windows(source, begin, most_pairs=self.most_pairs, stops=options.stops):
                error = window.error
                if isinstance(error, DAMAGES):
                    error = damage(error, path, lines=source.lines)
                named = dataclasses.replace(window, error=error, path=self.files.name(path), total=source.total)
                fitting = without(named, self.writer.problems(named.entries), stops=options.stops)
                yield encode(self.scorer, fitting, too_long=options.too_long, stops=options.stops)


@dataclass(frozen=True)
class Work:
    """Scores windows, and counts what is done. With `has_rejects` refused rows are written, and not logged."""

    scorer: Scorer
    options: RowOptions
    progress: Progress
    totals: Totals
    has_rejects: bool = False

    def score(self, window: Window) -> tuple[Window, list[ScoredRow]]:
        """Score a window that was tokenised; `check` it once its rows are written."""
        totals = self.totals
        before, bytes_before = totals.pairs, totals.bytes_scored
        pairs = sum(len(entry.pairs) for entry in window.entries)

        def count(more: int, tokens: int) -> None:
            totals.pairs += more
            totals.tokens += tokens
            if more > 0:
                done = (totals.pairs - before) / max(1, pairs)
                totals.bytes_scored = max(bytes_before, bytes_before + int((window.bytes_done - bytes_before) * done))
                self.progress(totals)

        scored, rows = score(self.scorer, window, stops=self.options.stops, count=count)
        totals.truncated += sum(sum(row.truncated) for row in rows)
        totals.without_instruction += sum(len(row.scores) for row in rows if row.is_without_instruction)
        if scored.error is None:
            totals.blank_lines += scored.blank_lines
            totals.bytes_scored = window.bytes_done
            self._refuse(scored)
        return scored, rows

    def check(self, window: Window) -> None:
        """Raise the error that ended the input behind the window, if there is one."""
        if window.error is not None:
            raise _named(window.error, window)

    def _refuse(self, window: Window) -> None:
        for refused in window.refused:
            found = refused.error
            error = InvalidLine(found.number, found.problem, found.unit, window.path)  # no traceback: it holds the row
            self.totals.refused += 1
            if len(self.totals.skipped) < MOST_LISTED:
                self.totals.skipped.append(error)
            if not self.has_rejects:
                log.warning("skipped %s", error)


@dataclass(frozen=True)
class Making:
    """Makes bytes of scored rows and of refused ones, as they are written."""

    writer: Writer
    pack: Callable[[bytes], bytes]

    def begin(self) -> bytes:
        """Make what is written before the first row; a packed file has a packed part also if it gets no rows."""
        return self.pack(self.writer.begin())

    def rows(self, rows: Sequence[ScoredRow]) -> bytes:
        """Make what is written of rows."""
        made = self.writer.rows(rows)
        return self.pack(made) if made else b""


def state_of(status: os.stat_result) -> State:
    """Tell the state of a file by its status.

    >>> state_of(os.stat("pairs.jsonl"))[2]
    1042
    """
    if not stat.S_ISREG(status.st_mode):
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_unchanged(file: BinaryIO, path: Path, state: State) -> None:
    """Raise CappyError if an open file is not in the state that it was in.

    >>> check_unchanged(file, Path("pairs.jsonl"), state_of(os.fstat(file.fileno())))
    """
    if state_of(os.fstat(file.fileno())) != state:
        raise CappyError(f"{path} changed while it was read; put back what it was and go on, or start anew")


def rejects(window: Window) -> bytes:
    """Make a line of JSON of every refused row: its line or row number, the reason, and its text.

    >>> rejects(window)
    b'{"line": 7, "error": "has no field \'response\'", "text": "{}"}\n'
    """
    return b"".join([json_line(_reject(refused, window.path)) for refused in window.refused])


def _reject(refused: Refused, path: str) -> dict[str, object]:
    error = refused.error
    found: dict[str, object] = {"file": path} if path else {}
    found |= {error.unit: error.number, "error": error.problem}
    if error.unit == "line":
        found["text"] = refused.raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return found


def _named(error: Exception, window: Window) -> Exception:
    """Give an error of a row the name of its file."""
    if isinstance(error, InvalidLine):
        error.path = window.path
    return error
