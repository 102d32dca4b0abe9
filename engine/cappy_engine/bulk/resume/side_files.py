"""Read and write the files beside an output: a run's settings and progress.

They are JSON, and replaced whole or not at all. A user's file may have such a name: one that no run wrote is never
replaced or removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cappy_engine import storage
from cappy_engine.bulk.resume.names import Names, new_of
from cappy_engine.errors import OutputError, reason_of

MOST_SETTINGS_BYTES = 2**20
MARKS = ("bytes", "rejected_bytes")
"""What stands in every mark of how far a run is, `bytes` first."""


def write_alone(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all, where no other process writes. A killed run's attempt is removed.

        >>> write_alone(Path("scored.jsonl.settings.json"), {"task": "score"})

    Raises OSError, and ValueError for NaN.
    """
    new = new_of(path)
    new.unlink(missing_ok=True)
    with storage.whole_file(path, meanwhile=new) as file:
        file.write(storage.json_bytes(document))


def check_ours(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Read what a run with these `keys` wrote to `path`; empty if nothing is there.

        >>> check_ours(Path("scored.jsonl.progress.json"), MARKS)
        {}

    Raises OutputError for anything else, and if the file that takes its place is not of such a run.
    """
    keys = list(keys)
    found: object = {}
    if os.path.lexists(path):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(_content(path))
        if not isinstance(found, dict) or not set(keys) <= found.keys():
            raise in_the_way(path)
    new = new_of(path)
    begin = storage.json_bytes({keys[0]: ""}).partition(b":")[0]
    if os.path.lexists(new) and (not new.is_file() or _content(new)[: len(begin)] not in _prefixes(begin)):
        raise in_the_way(new)
    return found if isinstance(found, dict) else {}


def mark(names: Names, progress: Mapping[str, Any]) -> None:
    """Write down how far a run is, once what it wrote is on the disk.

        >>> mark(Names(Path("scored.jsonl")), {"bytes": 4096, "rejected_bytes": 0})

    Raises OutputError.
    """
    try:
        write_alone(names.progress, progress)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{names.progress} cannot be written: {reason_of(error)}; go on with {names.way_on} once that is mended"
        ) from error


def read_mark(names: Names) -> dict[str, Any]:
    """Read how far a run was when it stopped; empty if it had marked nothing.

        >>> read_mark(Names(Path("new.jsonl")))
        {}

    Raises OutputError for anything else than `mark` wrote.
    """
    try:
        found = json.loads(storage.read_regular(names.progress, limit=MOST_SETTINGS_BYTES))
        if not isinstance(found, dict) or not set(MARKS) <= found.keys():
            raise TypeError("it is not of such a run")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        problem = f"{names.progress} cannot be read ({reason_of(error)}); remove {names.partial} and start anew"
        raise OutputError(problem) from error


def forget(names: Names, *, keeps_settings: bool = False) -> None:
    """Remove a run's settings, and how far it was. With `keeps_settings` those of a file that is there stay.

    >>> forget(Names(Path("scored.jsonl")))
    """
    for path in names.beside:
        if not (keeps_settings and path == names.settings):
            path.unlink(missing_ok=True)


def in_the_way(path: Path) -> OutputError:
    """Make the error that a file of another kind has one of our names.

    >>> in_the_way(Path("scored.jsonl.settings.json"))
    """
    return OutputError(f"{path} is in the way, and not of such a run; move or remove it")


def _content(path: Path) -> bytes:
    """Read a file. What is not one, or too long to be ours, is an error."""
    try:
        if stat.S_ISLNK(path.lstat().st_mode):
            raise in_the_way(path)
        return storage.read_regular(path, limit=MOST_SETTINGS_BYTES)
    except OSError as error:
        raise in_the_way(path) from error


def _prefixes(begin: bytes) -> set[bytes]:
    """List all beginnings of `begin`. A killed run may have written any of them, mostly all of `begin`."""
    return {begin[:size] for size in range(len(begin) + 1)}
