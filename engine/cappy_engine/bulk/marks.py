"""Keep how far a run is, in a file beside its output, which is replaced whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cappy_engine import storage
from cappy_engine.bulk.beside import MARKS, MOST_SETTINGS_BYTES, write_alone
from cappy_engine.bulk.growing import Names
from cappy_engine.errors import OutputError


def mark(names: Names, progress: Mapping[str, Any]) -> None:
    """Write down how far a run is, once what it wrote is on the disk.

        >>> mark(Names(Path("scored.jsonl")), {"bytes": 4096, "rejected_bytes": 0})

    Raises OutputError.
    """
    try:
        write_alone(names.progress, progress)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{names.progress} cannot be written: {error}; go on with --resume once that is mended"
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
        problem = f"{names.progress} cannot be read ({error}); remove {names.partial} and start anew"
        raise OutputError(problem) from error
