"""Find where an output goes, through links, and refuse places that must not be written. Writes nothing."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cappy_engine.errors import OutputError, reason_of

MOST_LINKS = 40
"""Links that are followed one after another, as on Linux."""
Input = BinaryIO | Path


@dataclass(frozen=True)
class Place:
    """Where an output goes: `path` with links followed, and its status, if it is there.

    `descriptor` is the number of an open file that the name stands for, as in /dev/stdout.
    """

    path: Path
    status: os.stat_result | None = None
    descriptor: int | None = None

    @property
    def is_stream(self) -> bool:
        """True for what is written to as it is, and not replaced."""
        return self.descriptor is not None or (self.status is not None and not stat.S_ISREG(self.status.st_mode))

    @property
    def partial(self) -> Path:
        """The name until all is written."""
        return self.path.with_name(f"{self.path.name}.partial")


def check_output(path: Path, *, force: bool, inputs: Sequence[Input] = ()) -> Place:
    """Find where `path` leads; raise OutputError if it cannot, or must not, be written.

    An existing file is replaced with `force` only, and none of the `inputs` ever is.

        >>> check_output(Path("scored.jsonl"), force=False).partial.name
        'scored.jsonl.partial'
    """
    try:
        place = _follow(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason_of(error)}") from error
    if not place.is_stream:
        check_not_read(
            place.partial, _status(place.partial), inputs, "has the name of our unfinished output; rename it"
        )
    if place.status is None:
        return place
    if stat.S_ISDIR(place.status.st_mode):
        raise OutputError(f"{path} is a folder; the output must be a file, not a folder")
    if stat.S_ISBLK(place.status.st_mode):
        raise OutputError(f"{path} is a disk; the output must be a file")
    check_not_read(path, place.status, inputs, "is the output too; choose another name")
    if not place.is_stream and not force:
        raise OutputError(f"{path} exists; choose another name, or replace it with --force")
    return place


def check_not_read(name: object, status: os.stat_result | None, inputs: Sequence[Input], problem: str) -> None:
    """Raise OutputError if an input is the file with this `status`, by whatever name.

    >>> check_not_read("out", os.stat("out"), [Path("in")], "is the output too; choose another name")
    """
    if status is None or not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        return  # a terminal or a socket is read and written
    for each in inputs:
        found = _status(each)
        if found is not None and os.path.samestat(found, status):
            raise OutputError(f"the input {name} {problem}")


def files_in(folder: Path, marker: str) -> list[Path]:
    """List the files of a folder that is read, so that none is written.

    None unless it holds `marker`: any other folder may be one of everything.

        >>> files_in(Path("cappy-bundle"), "manifest.json")[0]
        PosixPath('cappy-bundle/config.json')
    """
    is_known = (folder / marker).is_file()
    return sorted(path for path in folder.rglob("*") if path.is_file()) if is_known else []


def _follow(path: Path) -> Place:
    """Follow links one by one, up to a file or a descriptor of this process."""
    found, descriptors = path, re.compile(rf"(?:/dev/fd|/proc/{os.getpid()}(?:/task/\d+)?/fd)/(\d+)")
    for _ in range(MOST_LINKS):
        found = Path(os.path.realpath(found.parent), found.name)
        number = descriptors.fullmatch(str(found))
        if number:
            return Place(found, os.fstat(int(number[1])), int(number[1]))
        if not found.is_symlink():
            break
        found = found.parent / found.readlink()
    try:
        return Place(found, path.stat())  # or an error, where links lead in a circle
    except FileNotFoundError:
        return Place(found)


def _status(found: Input) -> os.stat_result | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not there, or not a file of the system
        return found.stat() if isinstance(found, Path) else os.fstat(found.fileno())
    return None
