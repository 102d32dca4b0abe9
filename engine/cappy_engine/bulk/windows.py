"""Gather rows into windows, by their place in the input; tokenise and score a window. Knows nothing of files.

A window is cut after a number of pairs, bytes or blank lines, so that the same rows are scored together whenever, and
however often, a run goes on. A stream cannot be read twice, so it is also cut where it pauses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cappy_engine.batching import EncodedPairs
from cappy_engine.bulk.formats.entries import BLANK, Blank, Entry, Position, Refused, ScoredRow, Source
from cappy_engine.errors import InvalidLine, InvalidPair, ScoringError
from cappy_engine.pairs import TooLong
from cappy_engine.scorer import Scorer

WINDOW_BYTES = 16 * 2**20
"""Rows that are larger together are scored at once: they are held in memory."""
MOST_BLANK_LINES = 2**18
"""A window with so many ends too, so that a run that is stopped among them ends soon."""

Count = Callable[[int, int], object]


@dataclass(frozen=True)
class Window:
    """Rows that are scored together, in input order, and the refused ones among them.

    `end` is the position behind them. `error` ended the input behind these rows: then a window is not whole, and a run
    that goes on begins with it. `encoded` are the pairs of all `entries`, one after another. `path` is the file, where
    there are several; `total` is what `end.done` grows to, `bytes_done` counts the bytes of all files up to `end`.
    """

    entries: list[Entry] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    blank_lines: int = 0
    end: Position = field(default_factory=Position)
    error: Exception | None = None
    encoded: EncodedPairs | None = None
    path: str = ""
    total: int | None = None
    bytes_done: int = 0


def windows(source: Source, start: Position, *, most_pairs: int, stops: bool) -> Iterator[Window]:
    """Gather the rows of a source from `start` on.

    With `stops` a row that cannot be used ends the input.

        >>> [len(window.entries) for window in windows(source, Position(), most_pairs=2, stops=True)]
        [2, 1]
    """
    rows = _Rows()
    try:
        for row in source.rows(start):
            if row is None:  # a pause
                if not (rows.entries or rows.refused):
                    continue
            else:
                if stops and isinstance(row, Refused):
                    raise row.error
                rows.take(row)
                if rows.pairs < most_pairs and rows.size < WINDOW_BYTES and rows.blank_lines < MOST_BLANK_LINES:
                    continue
                source.pass_over()  # else many rows that are too long would fill the memory
            yield rows.window(source.position() or start)
            rows = _Rows()
    except Exception as error:  # whatever ends the input: those before it come first
        yield rows.window(start, error)
        return
    if rows.entries or rows.refused or rows.blank_lines:
        yield rows.window(source.position() or start)


@dataclass
class _Rows:
    """The rows of a window that is not cut yet; how many pairs and bytes they have."""

    entries: list[Entry] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    blank_lines: int = 0
    pairs: int = 0
    size: int = 0

    def take(self, row: Entry | Refused | Blank) -> None:
        if row == BLANK:
            self.blank_lines += 1
        elif isinstance(row, Refused):
            self.refused.append(row)
            self.pairs += 1  # so many errors do not fill the memory either
            self.size += len(row.raw)
        elif isinstance(row, Entry):
            self.entries.append(row)
            self.pairs += len(row.pairs)
            self.size += row.size

    def window(self, end: Position, error: Exception | None = None) -> Window:
        return Window(self.entries, self.refused, self.blank_lines, end, error)


def refuse_entries(window: Window, problems: Mapping[int, str], *, stops: bool) -> Window:
    """Refuse the entries at some places, or with `stops` end the input at the first.

    >>> len(refuse_entries(window, {1: "cannot be written"}, stops=False).entries) == len(window.entries) - 1
    True
    """
    if not problems:
        return window
    bad = [_refusal(window.entries[place], problems[place]) for place in sorted(problems)]
    if stops:
        return dataclasses.replace(window, entries=window.entries[: min(problems)], error=bad[0].error)
    good = [entry for place, entry in enumerate(window.entries) if place not in problems]
    refused = sorted([*window.refused, *bad], key=lambda each: each.error.number)
    return dataclasses.replace(window, entries=good, refused=refused)


def encode(scorer: Scorer, window: Window, *, too_long: TooLong, stops: bool) -> Window:
    """Tokenise a window. Rows that cannot be tokenised are refused, or with `stops` end the input.

    >>> len(encode(scorer, window, too_long="truncate", stops=True).encoded) == len(window.entries)
    True
    """
    parts: list[EncodedPairs] = []
    good: list[Entry] = []
    refused = list(window.refused)
    left = [window.entries]
    while left:
        entries = left.pop()
        try:
            parts.append(scorer.encode([pair for entry in entries for pair in entry.pairs], too_long=too_long))
            good += entries
        except InvalidPair as error:
            place = _entry_of(entries, error.index)
            refusal = _refusal(entries[place], error.problem)
            if stops:
                before = encode(scorer, Window(entries[:place]), too_long=too_long, stops=True)
                return dataclasses.replace(
                    window,
                    entries=before.entries,
                    error=before.error or _chained(refusal.error, error),
                    encoded=before.encoded,
                )
            refused.append(refusal)
            rest = entries[place + 1 :]
            middle = len(rest) // 2
            left += [part for part in (rest[middle:], rest[:middle], entries[:place]) if part]
    refused.sort(key=lambda each: each.error.number)
    encoded = EncodedPairs.joined(parts) if parts else scorer.encode([])
    return dataclasses.replace(window, entries=good, refused=refused, encoded=encoded)


def score(scorer: Scorer, window: Window, *, stops: bool, count: Count) -> tuple[Window, list[ScoredRow]]:
    """Score a window that was tokenised. Rows whose pair fails in the model are refused, or with `stops` end the input.

    `count` is called with numbers of pairs and tokens as they are scored; negative ones take back what was counted.
    Raises ScoringError where no single pair is at fault.
    """
    rows: list[ScoredRow] = []
    refused, ended = list(window.refused), window.error
    left = [(window.entries, window.encoded or scorer.encode([]))]
    while left:
        entries, encoded = left.pop()
        if not entries:
            continue
        try:
            rows += _scored(scorer, entries, encoded, count)
        except ScoringError as error:
            if error.index is None:  # the device failed, not a pair
                raise
            place, starts = _entry_of(entries, error.index), _starts(entries)
            refusal = _refusal(entries[place], error.problem)
            before = entries[:place], encoded.chosen(np.arange(starts[place]))
            if stops:
                ended, left = _chained(refusal.error, error), [before]
                continue
            refused.append(refusal)
            behind = entries[place + 1 :], encoded.chosen(np.arange(starts[place + 1], len(encoded)))
            left += [behind, before]
    refused.sort(key=lambda each: each.error.number)
    return dataclasses.replace(window, refused=refused, error=ended), rows


def _scored(scorer: Scorer, entries: Sequence[Entry], encoded: EncodedPairs, count: Count) -> list[ScoredRow]:
    """Score entries; if a pair fails, what was counted of them is taken back."""
    counted = [0, 0]

    def note(pairs: int, tokens: int) -> None:
        counted[0] += pairs
        counted[1] += tokens
        count(pairs, tokens)

    try:
        found = scorer.score_encoded(encoded, progress=note)
    except ScoringError:
        count(-counted[0], -counted[1])
        raise
    scores, truncated, without = found.scores.tolist(), found.truncated.tolist(), set(found.without_instruction)
    starts = _starts(entries)
    return [
        ScoredRow(entry, scores[start:end], truncated[start:end], start in without)
        for entry, start, end in zip(entries, starts, starts[1:], strict=False)
    ]


def _starts(entries: Sequence[Entry]) -> list[int]:
    """List the place of each entry's first pair, and behind them the number of pairs."""
    return [0, *np.cumsum([len(entry.pairs) for entry in entries], dtype=np.int64).tolist()]


def _entry_of(entries: Sequence[Entry], pair: int) -> int:
    """Find the entry that holds a pair."""
    return int(np.searchsorted(np.cumsum([len(entry.pairs) for entry in entries]), pair, side="right"))


def _refusal(entry: Entry, problem: str) -> Refused:
    if not isinstance(entry.raw, bytes):
        return Refused(InvalidLine(entry.number, problem, "row"), b"")
    lines = entry.raw.rstrip(b"\r\n").count(b"\n") + 1
    return Refused(InvalidLine(entry.number, problem), entry.raw, lines)


def _chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error
