"""Open JSON Lines files, packed or not, and write their lines. Knows nothing of what the lines hold."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from cappy_engine.errors import CappyError


def is_packed(path: str | Path) -> bool:
    """Tell by its name if a file is packed with gzip.

    >>> is_packed("pairs.jsonl.gz")
    True
    """
    return str(path).lower().endswith(".gz")


@contextlib.contextmanager
def open_lines(path: str | Path) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz.

        >>> with open_lines("pairs.jsonl.gz") as lines:
        ...     first = next(lines)

    Raises OSError if it cannot be read, and CappyError if a .gz is damaged, empty or not complete.
    """
    with Path(path).open("rb") as plain:
        if not is_packed(path):
            yield plain
            return
        try:
            if not plain.peek(1):  # the library takes it for a packed file without content
                raise EOFError("it is empty")
            with gzip.GzipFile(fileobj=plain) as packed:
                yield cast(BinaryIO, packed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CappyError(f"{path} is not a complete gzip file: {error}") from error


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Write an object as a line of JSON Lines.

        >>> json_line({"instruction": "日本"}).decode()
        '{"instruction": "日本"}\\n'

    Lone surrogates, which UTF-8 does not have, are escaped; then all of the line is ASCII.
    """
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(fields).encode() + b"\n"
