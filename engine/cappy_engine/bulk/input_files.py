"""Say which files are read and what is done with them; notice when one changes."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.formats.file_format import Format, format_of
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import Task
from cappy_engine.errors import CappyError

State = tuple[int, ...]
"""What tells that a file is the same, and was not written to: its place, size and time; empty for a pipe."""
TICK_SECONDS = 0.02
"""Two writes within a tick of the clock of a file system may leave one time. Linux's has 10 ms at most."""


@dataclass(frozen=True)
class Files:
    """Files to read one after another, and what is done with rows. Errors name the file if they `are_named`.

    >>> Files([Path("a.csv"), Path("b.csv")], ScoreTask()).format.kind
    'csv'
    """

    paths: Sequence[Path]
    task: Task
    options: RowOptions = field(default_factory=RowOptions)
    are_named: bool = False

    def name(self, path: Path) -> str:
        """Give the name that errors of a file's rows begin with. It is empty for an only file."""
        return str(path) if self.are_named or len(self.paths) > 1 else ""

    @property
    def format(self) -> Format:
        """Tell the format of all of them. Raises CappyError if they have several."""
        formats = dict.fromkeys(str(format_of(path)) for path in self.paths)
        if len(formats) > 1:
            found = " and ".join(formats)
            raise CappyError(f"the inputs have several formats, {found}; give those of one format at a time")
        return format_of(self.paths[0])

    def check_columns(self, path: Path, found: Any, expected: Any) -> None:
        """Raise CappyError if a file has other columns than the first one.

        >>> Files([Path("a.csv"), Path("b.csv")], ScoreTask()).check_columns(Path("b.csv"), ["id"], ["id"])
        """
        if found != expected:
            raise CappyError(
                f"{path} has other columns than {self.paths[0]}; columns must be equal: make them so, or score it into "
                "another file"
            )

    def size(self) -> int:
        """Count the bytes of all files, packed as they are."""
        return sum(path.stat().st_size for path in self.paths)

    def states(self) -> list[State]:
        """Note how all files are, before they are read. `FileWindows` tells if one has changed since."""
        return [state_of(settled(path)) for path in self.paths]


def settled(path: Path) -> os.stat_result:
    """Give the status of a file once the next write would give it another time: a new one may have to wait a tick.

    >>> settled(Path("pairs.jsonl")).st_size
    1042
    """
    status = path.stat()
    left = status.st_mtime + TICK_SECONDS - time.time()
    if not stat.S_ISREG(status.st_mode) or not 0 < left <= TICK_SECONDS:  # more: the clocks differ
        return status
    time.sleep(left)
    return path.stat()


def state_of(status: os.stat_result) -> State:
    """Tell the state of a file by its status.

    >>> state_of(os.stat("pairs.jsonl"))[2]
    1042
    """
    if not stat.S_ISREG(status.st_mode):
        return ()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_unchanged(file: BinaryIO, path: Path, state: State) -> None:
    """Raise CappyError if an open file is not in the state that it was in.

    >>> check_unchanged(file, Path("pairs.jsonl"), state_of(os.fstat(file.fileno())))
    """
    if state_of(os.fstat(file.fileno())) != state:
        raise CappyError(f"{path} changed while it was read; put back what it was and go on, or start anew")
