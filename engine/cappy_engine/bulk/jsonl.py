"""Open JSON Lines files, packed or not, and write their lines. Knows nothing of what the lines hold."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.packing import unpacked


@contextlib.contextmanager
def open_lines(path: str | Path) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz or .zst.

        >>> with open_lines("pairs.jsonl.gz") as lines:
        ...     first = next(lines)

    Raises OSError if it cannot be read, and CappyError if a packed file is damaged, empty or not complete.
    """
    with Path(path).open("rb") as plain, unpacked(plain, path) as lines:
        yield lines


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
