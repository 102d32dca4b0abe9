"""Score JSON Lines, streaming: a window of rows is read, scored and written before the next one is read."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from cappy_engine.bulk.jsonl import json_line
from cappy_engine.bulk.lines import MAX_LINE_BYTES, Lines, check_length
from cappy_engine.bulk.rows import read_row
from cappy_engine.errors import InvalidLine, InvalidPair, ScoringError
from cappy_engine.options import Asked
from cappy_engine.pairs import TOO_LONG, Pair, TooLong
from cappy_engine.scorer import Scorer

WINDOW_PAIRS = 128
"""Rows that are read before they are scored: enough to give every core full batches, and few enough that results of the
full-size model on two cores come every minute."""
WINDOW_BYTES = 16 * 2**20
"""Rows that are larger together are scored at once: they are held in memory."""
SPACES = b" \t\r\n"

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Counts of the work that is done; `bytes_scored` counts bytes of input, to tell how much is left."""

    pairs: int = 0
    tokens: int = 0
    truncated: int = 0
    blank_lines: int = 0
    bytes_scored: int = 0
    skipped: list[InvalidLine] = field(default_factory=list)
    without_instruction: int = 0


@dataclass(frozen=True)
class LineOptions:
    """How lines are read and written.

    >>> LineOptions(on_error="skip").field_name
    'score'

    Raises ValueError.
    """

    on_error: Annotated[str, Asked("what to do at a bad line", choices=("stop", "skip"))] = "stop"
    field_name: Annotated[str, Asked("the name of the field to add", flag="--score-field", metavar="NAME")] = "score"
    too_long: Annotated[
        TooLong, Asked("what to do with a pair of more tokens than the model takes", choices=TOO_LONG)
    ] = "truncate"
    max_line_bytes: Annotated[int, Asked("a longer line is a bad one, and takes no memory", least=1)] = MAX_LINE_BYTES

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {self.on_error!r}")
        if self.field_name in ("", "instruction", "response"):
            raise ValueError(f"field_name must be a name of its own, got {self.field_name!r}")
        if self.max_line_bytes < 1:
            raise ValueError(f"max_line_bytes must be at least 1, got {self.max_line_bytes}")


@dataclass(frozen=True)
class _Row:
    number: int
    line: bytes
    pair: Pair


def score_lines(
    scorer: Scorer,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    *,
    on_error: str = "stop",
    field_name: str = "score",
    too_long: TooLong = "truncate",
    max_line_bytes: int = MAX_LINE_BYTES,
    progress: Callable[[Totals], object] = lambda totals: None,
) -> Totals:
    """Read JSON Lines, and write each row with its score in `field_name`, in the same order.

        >>> score_lines(scorer, open("pairs.jsonl", "rb"), sys.stdout.buffer.write).pairs
        7

    `lines` is an open file, or any iterable. A row keeps its bytes: the field is put before its last brace. A row that
    was truncated gets `"<field_name>_truncated": true` besides. `write` gets many rows at once: whenever enough were
    read, and whenever a pipe, a terminal or a socket pauses.

    A bad line raises InvalidLine after the rows before it were written (`on_error="stop"`), or is left out, logged, and
    listed in `Totals.skipped` (`on_error="skip"`). That is a line that `rows.read_row` refuses, one longer than
    `max_line_bytes`, one that has the field already, and one whose pair cannot be scored; with `too_long="refuse"` also
    one whose pair would be truncated. `progress` is called after every batch.
    """
    options = LineOptions(on_error, field_name, too_long, max_line_bytes)
    totals = Totals()
    source = Lines(lines, max_line_bytes)
    work = _Work(scorer, write, options, progress, totals)
    for window in _windows(work.rows(source)):
        work.score(window, source.bytes_read)
    totals.bytes_scored = source.bytes_read
    return totals


def _windows(rows: Iterator[_Row | None]) -> Iterator[list[_Row]]:
    """Gather rows up to a pause, or until there are enough; after an error of the input, those before it come first."""
    window: list[_Row] = []
    size = 0
    try:
        for row in rows:
            if row is not None:
                window.append(row)
                size += len(row.line)
            if window and (row is None or len(window) == WINDOW_PAIRS or size >= WINDOW_BYTES):
                yield window
                window, size = [], 0
    except Exception:
        if window:
            yield window
        raise
    if window:
        yield window


@dataclass(frozen=True)
class _Work:
    scorer: Scorer
    write: Callable[[bytes], object]
    options: LineOptions
    progress: Callable[[Totals], object]
    totals: Totals

    def rows(self, source: Lines) -> Iterator[_Row | None]:
        """Yield the good rows, and None for a pause."""
        number = 0
        for line in source:
            if line is None:
                yield None
                continue
            number += 1
            try:
                check_length(line, number, self.options.max_line_bytes)
                row = read_row(line, number)
                if row is not None:
                    self._check_free(row.fields, number)
            except InvalidLine as error:
                self._refuse(error)
                continue
            if row is None:
                self.totals.blank_lines += 1
            else:
                yield _Row(number, line, row.pair)

    def score(self, window: Sequence[_Row], bytes_read: int) -> None:
        """Score and write rows: all of them, or up to the first whose pair cannot be scored."""
        totals, before, pairs_before = self.totals, self.totals.bytes_scored, self.totals.pairs
        written: list[bytes] = []

        def count(pairs: int, tokens: int) -> None:
            totals.pairs += pairs
            totals.tokens += tokens
            totals.bytes_scored = before + (bytes_read - before) * (totals.pairs - pairs_before) // len(window)
            self.progress(totals)

        try:
            for row, score, is_truncated in self._scored(window, count):
                marks = {f"{self.options.field_name}_truncated": True} if is_truncated else {}
                written.append(_with_fields(row, {self.options.field_name: score, **marks}))
                totals.truncated += is_truncated
        finally:
            if written:
                self.write(b"".join(written))
        totals.bytes_scored = bytes_read

    def _scored(self, rows: Sequence[_Row], count: Callable[[int, int], object]) -> Iterator[tuple[_Row, float, bool]]:
        """Yield rows with their scores; where one cannot be scored, those before and behind it are scored again."""
        if not rows:
            return
        before = (self.totals.pairs, self.totals.tokens)
        try:
            found = self.scorer.score_pairs([row.pair for row in rows], too_long=self.options.too_long, progress=count)
        except (InvalidPair, ScoringError) as error:
            place = error.index
            if place is None:  # the device failed, not a pair
                raise
            self.totals.pairs, self.totals.tokens = before
            yield from self._scored(rows[:place], count)
            self._refuse(InvalidLine(rows[place].number, error.problem), error)
            yield from self._scored(rows[place + 1 :], count)
            return
        self.totals.without_instruction += len(found.without_instruction)
        yield from zip(rows, found.scores.tolist(), found.truncated.tolist(), strict=True)

    def _check_free(self, fields: Mapping[str, object], number: int) -> None:
        for name in (self.options.field_name, f"{self.options.field_name}_truncated"):
            if name in fields:
                raise InvalidLine(number, f"has a field {name!r} already; choose another with --score-field")

    def _refuse(self, error: InvalidLine, cause: Exception | None = None) -> None:
        """Raise the error, or log and list it."""
        if self.options.on_error == "stop":
            raise error from cause
        log.warning("skipped %s", error)
        self.totals.skipped.append(InvalidLine(error.number, error.problem))  # no traceback, which holds the line


def _with_fields(row: _Row, fields: Mapping[str, object]) -> bytes:
    """Put fields before the last brace of a row, whose other bytes stay as they are."""
    line = row.line.removeprefix(codecs.BOM_UTF8).rstrip(SPACES)
    begun = line[:-1].rstrip(SPACES)
    return b"%s, %s%s\n" % (begun, json_line(fields)[1:-2], line[len(begun) :])
