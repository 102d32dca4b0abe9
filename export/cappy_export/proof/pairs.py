"""Read the pairs that parity is measured on: the package's own, or the user's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cappy_engine.bulk.formats.json_lines import open_lines, read_rows
from cappy_engine.errors import ExportError, InvalidLine, message_of
from cappy_engine.pairs import Pair

MIN_PAIRS = 256
"""Fewer pairs say too little: a bad export can hide among a few."""


def parity_pairs(source: Path | None) -> tuple[str, list[Pair]]:
    """Read the pairs of `source`, or the package's own, with a name for them.

    >>> parity_pairs(None)[0]
    'default'

    Raises as `read_pairs`.
    """
    return ("default", default_pairs()) if source is None else (source.name, read_pairs(source))


def default_pairs() -> list[Pair]:
    """Read the pairs that ship with the package: 279, of 4 to over 1,000 RoBERTa tokens, with 84 instructions.

    >>> len(default_pairs())
    279

    Every word was written for this purpose: tasks in the form of instructions, code, logs and tables, over twenty
    scripts, emoji, degenerate and very long texts.
    """
    text = files("cappy_export.proof").joinpath("parity_pairs.jsonl").read_bytes()
    return [row.pair for row in read_rows(text.splitlines())]


def read_pairs(path: str | Path) -> list[Pair]:
    """Read parity pairs from JSON Lines with `instruction` and `response`.

    >>> read_pairs("my-pairs.jsonl")

    A file whose name ends in .gz is unpacked. Raises ExportError for a bad line, and for fewer than MIN_PAIRS pairs;
    CappyError for a .gz that is not complete.
    """
    try:
        with open_lines(path) as file:
            pairs = [row.pair for row in read_rows(file)]
    except InvalidLine as error:
        raise ExportError(f"{path}, {error}") from error
    except OSError as error:
        raise ExportError(f"the parity pairs cannot be read: {message_of(error)}") from error
    if len(set(pairs)) < MIN_PAIRS:
        raise ExportError(f"{path} has {len(set(pairs))} different pairs; parity needs at least {MIN_PAIRS}")
    return pairs
