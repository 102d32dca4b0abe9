"""Count what is done of a job. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cappy_engine.errors import InvalidLine

MARKED = ("pairs", "tokens", "truncated", "blank_lines", "bytes_scored", "without_instruction", "refused")
"""The counts that a run writes down, and goes on with."""


@dataclass
class Totals:
    """Counts of the work that is done. `bytes_scored` counts bytes of input, to tell how much is left.

    `skipped` lists the first rows that could not be used, `refused` counts the lines of all. `pairs_before` of `pairs`
    were scored by runs that this one goes on with, up to `bytes_begun`; `bytes_total` is the size of all inputs, if it
    is known.
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


Progress = Callable[[Totals], object]
