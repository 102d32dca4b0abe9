"""Open JSON Lines, parse their lines into fields and pairs, and write lines. Knows nothing of tokens or models."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.formats.compression import unpacked
from cappy_engine.bulk.formats.file_format import format_of
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.checks import described, shown
from cappy_engine.errors import CappyError, InvalidLine
from cappy_engine.pairs import Pair, text_problem


def _finite(text: str) -> float:
    """Parse a number. One beyond a float's range would not be written back as it was."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is beyond a float's range")
    return value


def _refuse(name: str) -> float:
    """Refuse NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not a value of JSON")


class _Twice(Exception):
    """A field that an object has twice."""


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields. Of two with one name, the first would be lost: an error."""
    found = dict(fields)
    if len(found) < len(fields):
        raise _Twice(Counter(name for name, _ in fields).most_common(1)[0][0])
    return found


class _Doubled(dict[str, Any]):
    """An object that has a field twice. `names` are those of all its fields."""

    def __init__(self, fields: list[tuple[str, Any]]) -> None:
        super().__init__(fields)
        self.names = [name for name, _ in fields]


def _any(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields, which tells if two have one name."""
    found = dict(fields)
    return found if len(found) == len(fields) else _Doubled(fields)


WHOLE = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse, object_pairs_hook=_once)
"""Reads what can be written back without loss."""
ANY = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_any)
ONE_LINE = "; a row is one line, as jq -c . writes it (of a list: jq -c '.[]')"


@dataclass(frozen=True)
class Row:
    """A line of JSON Lines: its number from 1, its fields, and their pair."""

    number: int
    fields: dict[str, Any]
    pair: Pair


@contextlib.contextmanager
def open_lines(path: str | Path) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz or .zst.

        >>> with open_lines("pairs.jsonl.gz") as lines:
        ...     first = next(lines)

    Raises OSError if it cannot be read, and CappyError if its name is that of another format, or if a packed file is
    damaged, empty or not complete.
    """
    with Path(path).open("rb") as plain:
        if (found := format_of(path)).kind != "jsonl":
            raise CappyError(
                f"{path} is {found}, and JSON Lines are read here; convert it first, as with pandas: "
                "to_json('rows.jsonl', orient='records', lines=True)"
            )
        with unpacked(plain, path) as lines:
            yield lines


def read_row(line: bytes, number: int) -> Row | None:
    """Parse one line of JSON Lines; None if the line is blank.

    The line must be a JSON object with the strings `instruction` and `response`; other fields are kept as they are.
    Raises InvalidLine, with `number`, for anything else.

        >>> read_row(b'{"instruction": "Is the sky blue?", "response": "Yes"}', 1).pair
        ('Is the sky blue?', 'Yes')
    """
    fields = read_fields(line, number, ("instruction", "response"), keeps_all=False)
    return None if fields is None else Row(number, fields, (fields["instruction"], fields["response"]))


def read_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file, without blank lines. Raises InvalidLine at the first bad line."""
    for number, line in numbered(lines):
        row = read_row(line, number)
        if row is not None:
            yield row


def read_fields(
    line: bytes, number: int, texts: Sequence[str], *, others: Sequence[str] = (), keeps_all: bool = True
) -> dict[str, Any] | None:
    """Parse the JSON object in a line of JSON Lines; None if it is blank.

    It must have the fields `texts`, all strings, and `others`, each once. Raises InvalidLine, with `number`, for
    anything else. With `keeps_all` a number beyond a float's range, and a field that comes twice in any object, are
    refused, since they could not be written back.

        >>> read_fields(b'{"instruction": "Is the sky blue?"}', 1, ("instruction",))
        {'instruction': 'Is the sky blue?'}
    """
    if not line.strip():
        return None
    decoder = WHOLE if keeps_all else ANY
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("a BOM may stand at the beginning of a file only")
        fields = decoder.decode(text)
    except UnicodeDecodeError as error:
        hint = "; it is packed, and is unpacked if its name ends in .gz" if line.startswith(b"\x1f\x8b") else ""
        raise InvalidLine(number, f"not UTF-8 (byte {error.start}: 0x{line[error.start]:02x}){hint}") from error
    except _Twice as error:
        raise InvalidLine(number, f"has the field {str(error)!r} twice; give it once") from error
    except (ValueError, RecursionError) as error:
        is_cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        raise InvalidLine(number, f"not JSON ({error}){ONE_LINE * is_cut}") from error
    if not isinstance(fields, dict):
        wanted, hint = " and ".join(map(repr, (*texts, *others))), ONE_LINE * isinstance(fields, list)
        raise InvalidLine(number, f"expected a JSON object with {wanted}, got {described(fields)}{hint}")
    for part in (*texts, *others):
        if part not in fields:
            found = ", ".join(shown(name) for name in list(fields)[:8]) or "no fields"
            raise InvalidLine(number, f"has no field {part!r}; found {found}{', ...' * (len(fields) > 8)}")
        problem = text_problem(fields[part])
        if problem and part in texts:
            raise InvalidLine(number, f"{part} {problem}")
        if isinstance(fields, _Doubled) and (times := fields.names.count(part)) > 1:
            raise InvalidLine(number, f"has the field {part!r} {times} times; give it once")
    return fields


def json_line(fields: Mapping[str, Any], *, allow_nan: bool = True) -> bytes:
    """Write an object as a line of JSON Lines.

        >>> json_line({"instruction": "日本"}).decode()
        '{"instruction": "日本"}\\n'

    Lone surrogates, which UTF-8 does not have, are escaped; then all of the line is ASCII. Without `allow_nan`, which
    JSON does not have, NaN is a ValueError.
    """
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=allow_nan).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(fields, allow_nan=allow_nan).encode() + b"\n"
