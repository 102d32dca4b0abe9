"""Keep a list of the complete files of a folder.

A run that goes on skips the files in the list. The list is FOLDER/cappy.run.json, with a line of JSON for each file. A
line is added once the file has its name, so the last of many files takes as long as the first. Knows nothing of rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine import storage
from cappy_engine.bulk.formats.lines import numbered
from cappy_engine.errors import InvalidLine, OutputError, reason_of

RUN = "cappy.run.json"
MOST_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Complete:
    """A file that is complete: the settings that decided its bytes, what was counted, and its size."""

    settings: Mapping[str, Any]
    totals: Mapping[str, int]
    bytes: int


class RunList:
    """The files of a run that are complete, by their names in the folder. They are on the disk, too.

    >>> RunList(Path("scored"), {}).add("a.jsonl", Complete(settings, Totals(pairs=7).marked(), 1042))
    """

    def __init__(self, folder: Path, complete: dict[str, Complete]) -> None:
        self.complete = complete
        self._path = folder / RUN
        self._left: tuple[int, int] | None = None

    def add(self, name: str, found: Complete) -> None:
        """Add a file. Raises OSError.

        All of the list is written, whole or not at all, for the first file: what was there may be of a run that this
        one replaces, or end in a torn line. So it is again where another run has written to it.
        """
        self.complete[name] = found
        if self._left is not None and self._state() == self._left:
            with storage.naming(self._path), self._path.open("ab") as file:
                storage.append(file, _line(name, found))
        else:
            with storage.whole_file(self._path) as file:
                file.writelines(_line(*each) for each in self.complete.items())
        self._left = self._state()

    def remove(self) -> None:
        """Remove the list, when all files are complete."""
        self._path.unlink(missing_ok=True)

    def _state(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            status = self._path.lstat()
            return status.st_ino, status.st_size
        return None


def read_complete(folder: Path) -> dict[str, Complete]:
    """Read the list of a folder; empty if there is none.

        >>> read_complete(Path("scored"))["a.jsonl"].bytes
        1042

    A torn last line is left out: its file has its name, and `runs.finished` knows it. Raises OutputError for anything
    else than such a list.
    """
    path = folder / RUN
    try:
        with storage.open_regular(path) as file:
            return _read(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidLine) as error:
        raise OutputError(f"{path} cannot be read ({reason_of(error)}); move or remove it, and start anew") from error


def _read(file: BinaryIO) -> dict[str, Complete]:
    found: dict[str, Complete] = {}
    for _, line in numbered(file, MOST_LINE_BYTES):
        if line.endswith(b"\n"):
            fields = json.loads(line)
            name = fields.pop("file")
            found[name] = Complete(**fields)
    if not found:
        raise ValueError("it is not of such a run")
    return found


def _line(name: str, found: Complete) -> bytes:
    return json.dumps({"file": name, **dataclasses.asdict(found)}, allow_nan=False).encode() + b"\n"
