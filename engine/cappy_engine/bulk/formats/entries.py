"""Say what rows and sources of rows are, and check what all sources check.

A source yields rows, errors (of rows that cannot be used), BLANK (a line without a row), and None (a stream pauses).
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cappy_engine.bulk.formats.lines import MAX_LINE_BYTES
from cappy_engine.bulk.tasks import Task
from cappy_engine.checks import shown
from cappy_engine.errors import CappyError, InvalidLine
from cappy_engine.pairs import Pair

MOST_KEPT_BYTES = 2**16
"""So much is kept of a row that is too long to be read."""
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""What a file in UTF-16 or UTF-32 begins with."""

Blank = Literal["blank"]
BLANK: Blank = "blank"


@dataclass(frozen=True, slots=True)
class Entry:
    """A good row: its number from 1, its pairs, its form when written back.

    `raw` is the row's own bytes; of a table it is (a batch, the row's place in it). `fields` are those of JSON or CSV,
    where the output has another format.
    """

    number: int
    pairs: tuple[Pair, ...]
    raw: Any
    size: int
    fields: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used: why, its bytes as far as read, and how many lines it takes."""

    error: InvalidLine
    raw: bytes
    lines: int = 1


@dataclass(frozen=True)
class ScoredRow:
    """A row with the scores of its pairs, and which of them were truncated."""

    entry: Entry
    scores: list[float]
    truncated: list[bool]
    is_without_instruction: bool = False


@dataclass(frozen=True)
class Position:
    """A place between two rows of a file.

    `offset` counts the bytes (unpacked) or rows before it, `number` the lines, `done` how much of the file is read.
    `file` is the place of the file, where there are several.
    """

    offset: int = 0
    number: int = 0
    done: int = 0
    file: int = 0


Item = Entry | Refused | Blank | None


class Source(Protocol):
    """A file's rows. `header` is what is written before them, `total` is what `Position.done` grows to.

    `columns` are the same in files that may be read one after another. `lines` counts the lines or rows that were read.
    `position` is None within a row that was too long to be read; `pass_over` goes to the end of it.
    """

    header: Any
    columns: Any
    total: int | None

    @property
    def lines(self) -> int: ...

    def rows(self, start: Position) -> Iterator[Item]: ...

    def position(self) -> Position | None: ...

    def pass_over(self) -> None: ...


@dataclass(frozen=True)
class Reading:
    """How rows are read: for which task, how long, and if all fields are wanted."""

    task: Task
    max_line_bytes: int = MAX_LINE_BYTES
    keeps_fields: bool = False


def refused(error: InvalidLine, raw: bytes, most_bytes: int) -> Refused:
    """Refuse a row; of one that is longer than `most_bytes`, only the beginning is kept.

    >>> refused(InvalidLine(7, "is longer than 100 bytes"), bytes(10**6), 100).raw == bytes(MOST_KEPT_BYTES)
    True
    """
    found = InvalidLine(error.number, error.problem, error.unit)  # no traceback and no cause: they hold the row
    return Refused(found, raw[:MOST_KEPT_BYTES] if len(raw) > most_bytes else raw)


def check_encoding(begin: bytes) -> None:
    """Raise CappyError if a file begins as UTF-16 or UTF-32: all would be bad.

    >>> check_encoding(b'{"instruction"')
    """
    if begin.startswith(WIDE_MARKS):
        raise CappyError("the input is UTF-16 or UTF-32; make it UTF-8, as with: iconv -f UTF-16 -t UTF-8")


def check_free(fields: Iterable[str], task: Task, number: int) -> None:
    """Raise InvalidLine if a row has a field that is to be added.

    >>> check_free({"instruction": "q"}, ScoreTask(), 1)
    """
    for name in task.added:
        if name in fields:
            raise InvalidLine(number, f"has a field {name!r} already; choose another with {task.name_option}")


def check_names(names: Sequence[str], reading: Reading, path: Path) -> None:
    """Raise CappyError unless a table has each column once, and none to be added.

        >>> check_names(["instruction", "response"], Reading(ScoreTask()), Path("pairs.csv"))

    Where all fields are wanted, no column may be there twice: one would be lost.
    """
    task, times = reading.task, Counter(names)
    for name in (*task.texts, *task.lists, *(names if reading.keeps_fields else ())):
        if times[name] != 1:
            found = ", ".join(shown(each) for each in names[:8]) or "no columns"
            problem = f"the column {name!r} {times[name]} times" if name in names else f"no column {name!r}"
            raise CappyError(f"{path} has {problem}; found {found}{', ...' * (len(names) > 8)}")
    for name in task.added:
        if name in names:
            raise CappyError(f"{path} has a column {name!r} already; choose another with {task.name_option}")
