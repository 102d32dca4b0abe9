"""Refuse a text that is too long to score, where its line is still known. Knows nothing of files or models."""

from __future__ import annotations

from collections.abc import Iterable

from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import MAX_TEXT_CHARS


def check_lengths(number: int, texts: Iterable[tuple[str, str]]) -> None:
    """Check the texts of line `number`, each with its name.

        >>> check_lengths(1, [("instruction", "Is the sky blue?"), ("response", "Yes")])

    Raises InvalidLine for a text above the scorers' limit, which no option of `cappy evaluate` changes.
    """
    for name, text in texts:
        if len(text) > MAX_TEXT_CHARS:
            raise InvalidLine(
                number, f"{name} has {len(text)} characters, and at most {MAX_TEXT_CHARS} are scored; shorten it"
            )
