"""Score JSON Lines, streaming: a window of rows is read, scored and written before the next one is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cappy_engine.bulk.jsonl import json_line
from cappy_engine.bulk.rows import Row, read_row
from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import TooLong
from cappy_engine.scorer import Scorer

WINDOW_PAIRS = 128
"""Rows that are read before they are scored: enough to give every core full batches, and few enough that results of the
full-size model on two cores come every minute."""

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


@dataclass
class _Window:
    rows: list[Row] = field(default_factory=list)
    bytes_read: int = 0


def score_lines(
    scorer: Scorer,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    *,
    on_error: str = "stop",
    field_name: str = "score",
    too_long: TooLong = "truncate",
    progress: Callable[[Totals], object] = lambda totals: None,
) -> Totals:
    """Read JSON Lines, and write each row with its score in `field_name`, in the same order.

        >>> score_lines(scorer, open("pairs.jsonl", "rb"), sys.stdout.buffer.write).pairs
        7

    A row that was truncated gets `"<field_name>_truncated": true` besides; with `too_long="refuse"` it is a bad line.
    A bad line (see `rows.read_row`; also one
    that has the field already) raises InvalidLine after the rows before it were written (`on_error="stop"`), or is left
    out, logged, and listed in `Totals.skipped` (`on_error="skip"`). `progress` is called after every batch.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
    if field_name in ("", "instruction", "response"):
        raise ValueError(f"field_name must be a name of its own, got {field_name!r}")
    totals = Totals()
    window = _Window()
    try:
        for row in _good_rows(lines, totals, window, on_error, field_name):
            window.rows.append(row)
            if len(window.rows) == WINDOW_PAIRS:
                _score_window(scorer, window, write, field_name, totals, progress, too_long)
    except InvalidLine:
        _score_window(scorer, window, write, field_name, totals, progress, too_long)
        raise
    _score_window(scorer, window, write, field_name, totals, progress, too_long)
    return totals


def _good_rows(
    lines: Iterable[bytes], totals: Totals, window: _Window, on_error: str, field_name: str
) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        window.bytes_read += len(line)
        try:
            row = read_row(line, number)
            for name in (field_name, f"{field_name}_truncated"):
                if row is not None and name in row.fields:
                    raise InvalidLine(number, f"has a field {name!r} already; choose another with --score-field")
        except InvalidLine as error:
            if on_error == "stop":
                raise
            log.warning("skipped %s", error)
            totals.skipped.append(InvalidLine(error.number, error.problem))  # without a traceback, which holds the line
            continue
        if row is None:
            totals.blank_lines += 1
        else:
            yield row


def _score_window(
    scorer: Scorer,
    window: _Window,
    write: Callable[[bytes], object],
    field_name: str,
    totals: Totals,
    progress: Callable[[Totals], object],
    too_long: TooLong,
) -> None:
    """Score and write the window's rows, and empty it."""
    before, size = totals.bytes_scored, window.bytes_read
    done = 0

    def count(pairs: int, tokens: int) -> None:
        nonlocal done
        done += pairs
        totals.pairs += pairs
        totals.tokens += tokens
        totals.bytes_scored = before + size * done // len(window.rows)
        progress(totals)

    scored = scorer.score_pairs([row.pair for row in window.rows], progress=count, too_long=too_long)
    for row, score, is_truncated in zip(window.rows, scored.scores, scored.truncated, strict=True):
        marks = {f"{field_name}_truncated": True} if is_truncated else {}
        write(json_line({**row.fields, field_name: float(score), **marks}))
    totals.truncated += int(scored.truncated.sum())
    totals.without_instruction += len(scored.without_instruction)
    totals.bytes_scored = before + size
    window.rows, window.bytes_read = [], 0
