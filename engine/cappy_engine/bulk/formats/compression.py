"""Unpack files while they are read, and pack what is written, part by part. Knows nothing of what they hold."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from cappy_engine.bulk.formats.file_format import Packing, packing_of
from cappy_engine.errors import CappyError, InstallationError, install_hint

DAMAGES = (EOFError, zlib.error, gzip.BadGzipFile)
"""Errors of a packed file that is not whole."""


@contextlib.contextmanager
def unpacked(plain: BinaryIO, path: str | Path) -> Iterator[BinaryIO]:
    """Yield the bytes of an open file, unpacked as its name says. Errors while they are read name the file.

        >>> with open("pairs.jsonl.gz", "rb") as plain, unpacked(plain, "pairs.jsonl.gz") as lines:
        ...     first = next(lines)

    Raises CappyError if a packed file is damaged, empty or not complete.
    """
    packing = packing_of(path)
    if not packing:
        yield plain
        return
    try:
        if not plain.peek(1):  # type: ignore[attr-defined]  # taken for a packed file without content
            raise EOFError("it is empty")
        if packing == "gz":
            with gzip.GzipFile(fileobj=plain) as file:
                yield cast(BinaryIO, file)
        else:
            with tables_for(path).open_zstd(plain) as unzipped:
                yield unzipped
    except DAMAGES as error:
        raise damage(error, path) from error


def damage(error: Exception, path: str | Path, *, lines: int = 0) -> CappyError:
    """Say that a packed file is damaged, behind so many lines if that is known.

    >>> damage(EOFError("it is empty"), "pairs.jsonl.gz")
    CappyError('pairs.jsonl.gz is not a complete gzip file: it is empty')
    """
    kind = "gzip" if packing_of(path) == "gz" else "zstd"
    place = f" (behind line {lines})" if lines else ""
    return CappyError(f"{path} is not a complete {kind} file: {error}{place}")


def packer(packing: Packing, path: str | Path = "") -> Callable[[bytes], bytes]:
    """Give the function that packs one part of a file. Packed parts, one after another, are a packed file.

    >>> gzip.decompress(packer("gz")(b"one") + packer("gz")(b"two"))
    b'onetwo'
    """
    if packing == "gz":
        return lambda content: gzip.compress(content, 6, mtime=0)  # the same content gives the same bytes
    if packing == "zst":
        pack: Callable[[bytes], bytes] = tables_for(path).pack_zstd
        return pack
    return lambda content: content


def tables_for(path: str | Path) -> Any:
    """Import the module that reads Parquet and unpacks zstd, for the file at `path`. Raises InstallationError.

    >>> tables_for("pairs.jsonl.zst").pack_zstd(b"one")
    """
    try:
        from cappy_engine.bulk.formats import tables
    except ModuleNotFoundError as error:
        raise InstallationError(f"{path} needs the package {error.name!r}; {install_hint('cpu,files')}") from error
    return tables
