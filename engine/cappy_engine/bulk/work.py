"""Score windows, count what is done, and list the rows that were refused. Knows nothing of files."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cappy_engine.bulk.formats.entries import Refused, ScoredRow
from cappy_engine.bulk.formats.json_lines import json_line
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.totals import Progress, Totals
from cappy_engine.bulk.windows import Window, score
from cappy_engine.errors import InvalidLine
from cappy_engine.scorer import Scorer

MOST_LISTED = 1000
"""Refused rows that are listed in `Totals.skipped`; all are counted."""

log = logging.getLogger(__name__)


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
            self.totals.refused += refused.lines
            if len(self.totals.skipped) < MOST_LISTED:
                self.totals.skipped.append(error)
            if not self.has_rejects:
                log.warning("skipped %s", error)


def rejects(window: Window) -> bytes:
    """Make a line of JSON of every refused row: its number, the reason, its text.

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
