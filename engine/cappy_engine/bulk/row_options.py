"""Say how rows are read and scored. Knows nothing of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cappy_engine.bulk.formats.lines import MAX_LINE_BYTES
from cappy_engine.options import Asked, check_asked
from cappy_engine.pairs import TOO_LONG, TooLong

MOST_LINE_BYTES = 2**62
"""Leaves room: more than the limit is read at a time, and Python counts these bytes in 64 bits, with a sign."""
FILE_WINDOW_PAIRS = 2048
"""Pairs of a file that are scored together. If the process is killed, at most three times as many are lost."""


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
    max_line_bytes: Annotated[
        int, Asked("a longer line of JSON or CSV is a bad one, and takes no memory", least=1, most=MOST_LINE_BYTES)
    ] = MAX_LINE_BYTES
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
