"""Read lines of JSON Lines as rows: fields, and the pair in them. Knows nothing of files, tokens or models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cappy_engine.bulk.lines import numbered
from cappy_engine.checks import described, shown
from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import Pair, text_problem


@dataclass(frozen=True)
class Row:
    """A line of a JSON Lines file: its number from 1, all of its fields, and the pair in them."""

    number: int
    fields: dict[str, Any]
    pair: Pair


def read_row(line: bytes, number: int) -> Row | None:
    """Parse one line of JSON Lines; None if the line is blank.

    The line must be a JSON object with the strings `instruction` and `response`; other fields are kept as they are.
    Raises InvalidLine, with `number`, for anything else.

        >>> read_row(b'{"instruction": "Is the sky blue?", "response": "Yes"}', 1).pair
        ('Is the sky blue?', 'Yes')
    """
    fields = read_fields(line, number, ("instruction", "response"), parse_float=float)
    return None if fields is None else Row(number, fields, (fields["instruction"], fields["response"]))


def read_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file, without blank lines. Raises InvalidLine at the first bad line."""
    for number, line in numbered(lines):
        row = read_row(line, number)
        if row is not None:
            yield row


def finite(text: str) -> float:
    """Parse a number, or raise ValueError for one that would become infinity.

    >>> finite("0.5")
    0.5
    """
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is beyond a float's range")
    return value


def read_fields(
    line: bytes, number: int, texts: Sequence[str], *, parse_float: Callable[[str], float] = finite
) -> dict[str, Any] | None:
    """Parse the JSON object in one line of JSON Lines; None if the line is blank.

    It must have the fields `texts`, all strings, and each once. Raises InvalidLine, with `number`, for anything else.
    Without `parse_float` a number beyond a float's range is refused, since it could not be written back.

        >>> read_fields(b'{"instruction": "Is the sky blue?"}', 1, ("instruction",))
        {'instruction': 'Is the sky blue?'}
    """
    if not line.strip():
        return None
    objects = _Objects()
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        fields = json.loads(text, parse_float=parse_float, parse_constant=_refuse, object_pairs_hook=objects.keep)
    except UnicodeDecodeError as error:
        hint = "; it is packed, and is unpacked if its name ends in .gz" if line.startswith(b"\x1f\x8b") else ""
        raise InvalidLine(number, f"not UTF-8 (byte {error.start}: 0x{line[error.start]:02x}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidLine(number, f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        wanted = " and ".join(map(repr, texts))
        raise InvalidLine(number, f"expected a JSON object with {wanted}, got {described(fields)}")
    for part in texts:
        if part not in fields:
            found = ", ".join(shown(name) for name in list(fields)[:8]) or "no fields"
            raise InvalidLine(number, f"has no field {part!r}; found {found}{', ...' * (len(fields) > 8)}")
        problem = text_problem(fields[part])
        if problem:
            raise InvalidLine(number, f"{part} {problem}")
        if objects.count(part) > 1:
            raise InvalidLine(number, f"has the field {part!r} {objects.count(part)} times; give it once")
    return fields


class _Objects:
    """Makes objects of a JSON text, and knows all names of the last one, which is the outermost."""

    def __init__(self) -> None:
        self._last: list[tuple[str, Any]] = []

    def keep(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._last = pairs
        return dict(pairs)

    def count(self, name: str) -> int:
        return sum(name == each for each, _ in self._last)


def _refuse(name: str) -> float:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not a value of JSON")
