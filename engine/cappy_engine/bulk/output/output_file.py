"""Write a file that a user named, complete or not at all. It is OUT.partial until then.

OUT.partial is made exclusively, is never followed, and is locked until the process ends. A file that is replaced keeps
its links, its mode, its owner and its attributes. Pipes, devices and open descriptors are written to as they are. Knows
nothing of what the file holds.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from cappy_engine import storage
from cappy_engine.bulk.formats.file_format import packing_of
from cappy_engine.bulk.output import replacement
from cappy_engine.bulk.output.places import Input, Place, check_output
from cappy_engine.errors import OutputError, reason_of

log = logging.getLogger(__name__)
Say = Callable[[str], object]


@contextlib.contextmanager
def open_output(
    path: Path, *, force: bool = False, inputs: Sequence[Input] = (), say: Say = log.warning
) -> Iterator[BinaryIO]:
    """Yield a file that appears under its name only when everything was written.

    It is packed if the name ends in .gz. Until then it is OUT.partial, which is kept after an error unless it is empty.
    `say` is told so.

        >>> with open_output(Path("scored.jsonl")) as output:
        ...     output.write(b"{}")

    Raises OutputError, before anything is written if that is possible, and OSError.
    """
    place = check_output(path, force=force, inputs=inputs)
    if packing_of(path) == "zst":
        raise OutputError(f"{path} cannot be packed with zstd here; choose a name that ends in .gz")
    if place.is_stream:
        with io.BufferedWriter(storage.NamedFile(_open_stream(place), path)) as stream, _packed(stream, path) as output:
            yield output
        return
    raw, is_written_over = _begin(place, force=force, say=say)
    is_empty = True
    with io.BufferedRandom(raw) as file:
        try:
            with _packed(file, path) as output:
                try:
                    yield output
                finally:
                    is_empty = not output.tell()
            file.flush()
            with storage.naming(place.partial):
                os.fsync(file.fileno())
            _finish(raw, place, is_written_over)
        except BaseException:
            _leave(file, place.partial, say, is_empty=is_empty)
            raise


def _open_stream(place: Place) -> int:
    try:
        if place.descriptor is None:
            return os.open(place.path, os.O_WRONLY | os.O_NOCTTY)
        if place.status and not stat.S_ISSOCK(place.status.st_mode):
            os.write(place.descriptor, b"")  # an error, if it was opened for reading only
        return os.dup(place.descriptor)
    except OSError as error:
        raise OutputError(f"{place.path} cannot be written: {reason_of(error)}") from error


@contextlib.contextmanager
def _packed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    if not packing_of(path):
        yield file
        return
    with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:  # the same content gives the same bytes
        yield cast(BinaryIO, packed)


def _begin(place: Place, *, force: bool, say: Say) -> tuple[storage.NamedFile, bool]:
    """Make and lock OUT.partial. Also tell if its content must be written over a file."""
    partial = place.partial
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    mode = 0o666 if place.status is None else 0o600
    try:
        clear_partial(partial, force=force, say=say)
        file = storage.NamedFile(os.open(partial, flags, mode), partial, "w+b")
    except FileExistsError as error:
        raise _taken(partial) from error
    except OSError as error:
        raise OutputError(f"{partial} cannot be written: {reason_of(error)}") from error
    try:
        is_locked = True
        with contextlib.suppress(OSError):  # a file system without locks: it was made exclusively all the same
            is_locked = storage.lock(file.fileno())
        if not is_locked or not is_at(file, partial):
            raise _taken(partial)
        return file, replacement.prepare(file.fileno(), place.path, place.status)
    except BaseException:
        if is_at(file, partial):
            partial.unlink()
        file.close()
        raise


def clear_partial(partial: Path, *, force: bool, say: Say) -> None:
    """Remove, with `force`, what a stopped run left; nothing if nothing is there.

        >>> clear_partial(Path("scored.jsonl.partial"), force=False, say=print)

    Raises OutputError without `force`, for a file in use, and for anything of that name but a file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.fdopen(os.open(partial, flags), "rb")
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{partial} is in the way, and not a file of ours; move or remove it") from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OutputError(f"{partial} is in the way, and not a file of ours; move or remove it")
        try:
            is_free = storage.lock(file.fileno())
        except OSError as error:
            raise OutputError(f"{partial} exists, and may be in use; if it is not, move or remove it") from error
        if not is_free:
            raise _taken(partial)
        if not force:
            raise OutputError(f"{partial} holds what a stopped run left; move or remove it, or replace it with --force")
        say(f"note: replacing {partial}, which holds what a stopped run left")
        partial.unlink()


def _taken(partial: Path) -> OutputError:
    return OutputError(f"another process writes to {partial}; wait for it, or choose another name")


def _finish(file: storage.NamedFile, place: Place, is_written_over: bool) -> None:
    if not is_at(file, place.partial):
        raise OutputError(f"{place.partial} was moved or removed meanwhile; run the command again")
    size, written = os.fstat(file.fileno()).st_size, file.written
    if size != written:
        raise OutputError(f"{place.partial} has {size} bytes, and {written} were written; remove it and start anew")
    if place.status is None and os.path.lexists(place.path):
        raise OutputError(f"{place.path} has appeared meanwhile; move it away, and rename {place.partial}")
    if place.status is None:
        storage.rename(place.partial, place.path)
    else:
        replacement.replace(file, place.partial, place.path, place.status, is_written_over=is_written_over)


def _leave(file: BinaryIO, partial: Path, say: Say, *, is_empty: bool) -> None:
    """Leave OUT.partial and tell of it after an error; remove it if nothing was written."""
    if not is_at(file, partial):
        return
    if is_empty:
        partial.unlink()
    else:
        say(f"what was written before this is in {partial}")


def is_at(file: BinaryIO, path: Path) -> bool:
    """True if an open file has this name.

    >>> is_at(file, Path("scored.jsonl.partial"))
    True
    """
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False
