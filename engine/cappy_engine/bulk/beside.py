"""The small files beside an output, which say what a run is and how far: JSON, replaced whole or not at all.

They have names that a user's file may have too. One that no run wrote is never replaced or removed.
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
from cappy_engine.errors import OutputError

MOST_SETTINGS_BYTES = 2**20
MARKS = ("bytes", "rejected_bytes")
"""What stands in every mark of how far a run is, `bytes` first."""


def write_alone(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all, where no other process writes; nothing is left of a killed run's attempt.

        >>> write_alone(Path("scored.jsonl.settings.json"), {"task": "score"})

    Raises OSError, and ValueError for NaN.
    """
    new = new_of(path)
    new.unlink(missing_ok=True)
    with storage.whole_file(path, meanwhile=new) as file:
        file.write(storage.json_bytes(document))


def new_of(path: Path) -> Path:
    """Name the file that takes the place of `path`.

    >>> new_of(Path("scored.jsonl.settings.json")).name
    'scored.jsonl.settings.json.new'
    """
    return path.with_name(f"{path.name}.new")


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


def in_the_way(path: Path) -> OutputError:
    """Make the error that a file of another kind has one of our names.

    >>> in_the_way(Path("scored.jsonl.settings.json"))
    """
    return OutputError(f"{path} is in the way, and not of such a run; move or remove it")


def _content(path: Path) -> bytes:
    """Read a file; what is not one, or too long to be ours, is an error."""
    try:
        if stat.S_ISLNK(path.lstat().st_mode):
            raise in_the_way(path)
        return storage.read_regular(path, limit=MOST_SETTINGS_BYTES)
    except OSError as error:
        raise in_the_way(path) from error


def _prefixes(begin: bytes) -> set[bytes]:
    """List what a killed run may have written of `begin`, which is all of it mostly."""
    return {begin[:size] for size in range(len(begin) + 1)}
