"""What a pair is, and how one line of a JSON Lines file becomes one. Knows nothing of tokens or models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cappy_engine.errors import InvalidLine, InvalidPair

Pair = tuple[str, str]
"""(instruction, response), both taken as they are: nothing is stripped or normalised."""


@dataclass(frozen=True)
class Row:
    """One line of a JSON Lines file: its number from 1, all of its fields, and the pair in them."""

    number: int
    fields: dict[str, Any]
    pair: Pair


def check_pairs(pairs: Iterable[Sequence[str]]) -> list[Pair]:
    """Return `pairs` as a list of tuples.

    Raises InvalidPair (with the index) for anything that is not two strings, and for a string that is not valid
    Unicode (a lone surrogate): no tokenizer could see it.
    """
    if isinstance(pairs, str):
        raise InvalidPair(0, f"expected (instruction, response) pairs, got one str: {pairs[:40]!r}")
    checked: list[Pair] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidPair(index, f"expected a tuple (instruction, response), got {_described(pair)}")
        for part, text in zip(("instruction", "response"), pair, strict=True):
            problem = text_problem(text)
            if problem:
                raise InvalidPair(index, f"{part} {problem}")
        checked.append((pair[0], pair[1]))
    return checked


def text_problem(text: object) -> str | None:
    """Say why `text` cannot be tokenised, or None if it can."""
    if not isinstance(text, str):
        return f"must be a str, got {_described(text)}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a lone surrogate {text[error.start]!r} at character {error.start}; it is not valid Unicode"
    return None


def read_row(line: bytes, number: int) -> Row | None:
    """Parse one line of JSON Lines; None if the line is blank.

    The line must be a JSON object with the strings `instruction` and `response`; other fields are kept as they are.
    Raises InvalidLine, with `number`, for anything else.
    """
    fields = read_fields(line, number, ("instruction", "response"))
    return None if fields is None else Row(number, fields, (fields["instruction"], fields["response"]))


def read_fields(line: bytes, number: int, texts: Sequence[str]) -> dict[str, Any] | None:
    """The JSON object in one line of JSON Lines, which must have the fields `texts`, all strings; None if it is blank.

    Raises InvalidLine, with `number`, for anything else.
    """
    if not line.strip():
        return None
    try:
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_float=_finite)
    except UnicodeDecodeError as error:
        raise InvalidLine(number, f"not UTF-8 (byte {error.start}: 0x{line[error.start]:02x})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidLine(number, f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        wanted = " and ".join(map(repr, texts))
        raise InvalidLine(number, f"expected a JSON object with {wanted}, got {_described(fields)}")
    for part in texts:
        if part not in fields:
            found = ", ".join(_shown(name) for name in list(fields)[:8]) or "no fields"
            raise InvalidLine(number, f"has no field {part!r}; found {found}{', ...' * (len(fields) > 8)}")
        problem = text_problem(fields[part])
        if problem:
            raise InvalidLine(number, f"{part} {problem}")
    return fields


def read_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file, blank lines left out; raises InvalidLine at the first bad line."""
    for number, line in enumerate(lines, start=1):
        row = read_row(line, number)
        if row is not None:
            yield row


def _finite(text: str) -> float:
    """A number that would come out as infinity would not go back as it was."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is beyond a float's range")
    return value


def _described(value: object) -> str:
    return f"{type(value).__name__} {_shown(value)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
