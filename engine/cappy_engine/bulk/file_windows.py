"""Read files window by window: rows that the output can hold, tokenised. Knows nothing of what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.formats.compression import DAMAGES, damage
from cappy_engine.bulk.formats.entries import Position, Reading
from cappy_engine.bulk.formats.sources import read_source
from cappy_engine.bulk.formats.writers import Writer
from cappy_engine.bulk.input_files import Files, State, check_unchanged
from cappy_engine.bulk.row_options import FILE_WINDOW_PAIRS, RowOptions
from cappy_engine.bulk.windows import Window, encode, refuse_entries, windows
from cappy_engine.scorer import Scorer

BATCHES_OF_A_WINDOW = 16
"""A window has at least as many pairs as fill so many batches, of 32 tokens each: large batches need more to choose
from."""


def most_pairs_of(scorer: Scorer, options: RowOptions) -> int:
    """Tell how many pairs of a file make a window. The largest batch decides, not how fast this machine is.

    >>> most_pairs_of(scorer, RowOptions())
    2048
    """
    by_batches = BATCHES_OF_A_WINDOW * scorer.dispatcher.grouping.max_batch_tokens // 32
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
        """Yield the windows of a file; none was read behind a change. A pipe has no state to compare."""
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
            self.files.check_columns(path, source.columns, self.columns)
            for window in windows(source, begin, most_pairs=self.most_pairs, stops=options.stops):
                error = window.error
                if isinstance(error, DAMAGES):
                    error = damage(error, path, lines=source.lines)
                named = dataclasses.replace(window, error=error, path=self.files.name(path), total=source.total)
                writable = refuse_entries(named, self.writer.problems(named.entries), stops=options.stops)
                yield encode(self.scorer, writable, too_long=options.too_long, stops=options.stops)
