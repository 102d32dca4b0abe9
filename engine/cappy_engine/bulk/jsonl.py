"""Open JSON Lines files, packed or not. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from cappy_engine.errors import CappyError


@contextlib.contextmanager
def open_lines(path: str | Path) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz.

    Raises OSError if it cannot be read, and CappyError if a .gz is damaged or not complete.
    """
    if not str(path).endswith(".gz"):
        with Path(path).open("rb") as plain:
            yield plain
        return
    try:
        with gzip.open(path) as packed:
            yield cast(BinaryIO, packed)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CappyError(f"{path} is not a complete gzip file: {error}") from error
