"""Say how rows are read and scored, and count what is done. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from cappy_engine.bulk.lines import MAX_LINE_BYTES
from cappy_engine.errors import InvalidLine
from cappy_engine.options import Asked, check_asked
from cappy_engine.pairs import TOO_LONG, TooLong

FILE_WINDOW_PAIRS = 2048
"""Pairs of a file that are scored together, and lost at most if the process is killed."""

MARKED = ("pairs", "tokens", "truncated", "blank_lines", "bytes_scored", "without_instruction", "refused")
"""The counts that a run writes down, and goes on with."""


@dataclass
class Totals:
    """Counts of the work that is done; `bytes_scored` counts bytes of input, to tell how much is left.

    `skipped` lists the first rows that could not be used, `refused` counts all. `pairs_before` of `pairs` were scored
    by runs that this one goes on with, up to `bytes_begun`; `bytes_total` is the size of all inputs, if it is known.
    """

    pairs: int = 0
    tokens: int = 0
    truncated: int = 0
    blank_lines: int = 0
    bytes_scored: int = 0
    skipped: list[InvalidLine] = field(default_factory=list)
    without_instruction: int = 0
    refused: int = 0
    pairs_before: int = 0
    tokens_before: int = 0
    bytes_total: int | None = None
    bytes_begun: int = 0

    def marked(self) -> dict[str, int]:
        """Give the counts that a run goes on with."""
        return {name: getattr(self, name) for name in MARKED}

    @classmethod
    def counted(cls, marked: Mapping[str, int]) -> Totals:
        """Read what `marked` gave.

        >>> Totals.counted({"pairs": 7, "tokens": 90}).pairs
        7
        """
        found = cls()
        for name in MARKED:
            setattr(found, name, int(marked.get(name, 0)))
        return found

    @classmethod
    def going_on(cls, marked: Mapping[str, int]) -> Totals:
        """Begin with what an earlier run had counted.

        >>> Totals.going_on({"pairs": 7, "tokens": 90}).pairs_before
        7
        """
        found = cls.counted(marked)
        found.pairs_before, found.tokens_before, found.bytes_begun = found.pairs, found.tokens, found.bytes_scored
        return found

    def add(self, other: Totals) -> None:
        """Add the counts of another file.

        >>> Totals().add(Totals(pairs=7))
        """
        for name in (*MARKED, "pairs_before", "tokens_before", "bytes_begun"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped += other.skipped


@dataclass(frozen=True)
class RowOptions:
    """How rows are read and scored.

    >>> RowOptions(on_error="skip").too_long
    'truncate'

    Raises ValueError.
    """

    on_error: Annotated[str, Asked("what to do at a bad line", choices=("stop", "skip"))] = "stop"
    too_long: Annotated[
        TooLong, Asked("what to do with a pair of more tokens than the model takes", choices=TOO_LONG)
    ] = "truncate"
    max_line_bytes: Annotated[int, Asked("a longer line is a bad one, and takes no memory", least=1)] = MAX_LINE_BYTES
    window: Annotated[
        int | None,
        Asked(f"pairs that are sorted by length together (default: {FILE_WINDOW_PAIRS} of a file, or more)", least=1),
    ] = None

    def __post_init__(self) -> None:
        check_asked(self)

    @property
    def stops(self) -> bool:
        """True if a bad row ends the run."""
        return self.on_error == "stop"


Progress = Callable[[Totals], object]
