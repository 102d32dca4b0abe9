"""Let a file grow as OUT.partial, batch by batch, and go on after a stop.

A line counts once it is on the disk, up to its newline. OUT.settings.json keeps the settings that decide the lines: a
run goes on only with those it began with. Its origin (versions, input) may change, and every change is kept. A run that
replaces OUT has OUT.partial.settings.json until then. Knows nothing of what the lines hold.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from cappy_engine import storage
from cappy_engine.bulk.formats.lines import MAX_LINE_BYTES, numbered
from cappy_engine.bulk.output import replacement
from cappy_engine.bulk.output.output_file import clear_partial, is_at
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.resume.settings import changes
from cappy_engine.bulk.resume.side_files import MARKS, MOST_SETTINGS_BYTES, check_ours, forget, write_alone
from cappy_engine.errors import InvalidLine, OutputError, reason_of

MOST_LINE_BYTES = 16 * MAX_LINE_BYTES
"""A line holds one of the input, and what was made of it."""

log = logging.getLogger(__name__)
Say = Callable[[str], object]


@contextlib.contextmanager
def open_growing(names: Names, *, resume: bool) -> Iterator[Growing]:
    """Open and lock the partial file, new or to go on with. Two runs never write to it at once.

        >>> with open_growing(Names(Path("out.jsonl")), resume=False) as growing:
        ...     growing.begin({"seed": 0}, {"versions": {}})
        ...     growing.append(b"{}\\n")
        ...     growing.finish()

    Raises OutputError if that cannot be done.
    """
    flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | (0 if resume else os.O_CREAT | os.O_EXCL)
    try:
        names.partial.parent.mkdir(parents=True, exist_ok=True)
        if names.is_forced and not resume:
            clear_partial(names.partial, force=True, say=log.warning)
        file = cast(BinaryIO, os.fdopen(os.open(names.partial, flags, 0o666), "r+b"))
    except OSError as error:
        raise OutputError(f"{names.partial} cannot be written: {reason_of(error)}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(_close, file)
        try:
            is_ours = storage.lock(file.fileno())
        except OSError as error:
            if not resume:
                names.partial.unlink()
            raise OutputError(
                f"{names.partial} cannot be locked: {reason_of(error)}; choose a folder on a file system that has locks"
            ) from error
        if not is_ours:
            raise OutputError(f"another run writes to {names.partial}; wait for it, or stop it")
        yield Growing(names, file, replacement.prepare(file.fileno(), names.target, names.status))


@dataclass(frozen=True)
class Growing:
    """An open, locked partial file; `open_growing` makes one. Every method raises OutputError."""

    names: Names
    file: BinaryIO
    is_written_over: bool

    def begin(self, settings: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        """Write the settings of a new run, and remove what an earlier one left.

        A run may go on with another `origin`. What no such run wrote is not touched, and is an error.
        """
        document = {**settings, **origin}
        try:
            check_ours(self.names.settings, document)
            check_ours(self.names.new_settings, document)
            if check_ours(self.names.progress, MARKS).get("making"):
                self.names.made.unlink(missing_ok=True)
            self.names.progress.unlink(missing_ok=True)  # first: a mark of another run is none of this one
            replaces = self.names.status is not None
            forget(self.names, keeps_settings=replaces)
            self._write_settings(self.names.new_settings if replaces else self.names.settings, document)
        except OutputError:
            self.names.partial.unlink()
            raise

    def check_settings(self, settings: Mapping[str, Any], origin: Mapping[str, Any], say: Say) -> None:
        """Raise an error that names all settings that are not as the run began.

        Another `origin` may go on: that is said, and added to the settings as an entry of "resumed_with".
        """
        partial, path = self.names.partial, self._settings
        try:
            before = json.loads(storage.read_regular(path, limit=MOST_SETTINGS_BYTES))
            others = before.pop("resumed_with", [])
            begun = {name: before.pop(name) for name in origin}
            changed = changes(before, settings)
            moved = changes(others[-1] if others else begun, origin)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise OutputError(f"{partial} has lost its settings ({error!r}); remove it and start anew") from error
        if changed:
            raise OutputError(
                f"{partial} belongs to another run ({changed}); go on as it began, or remove it and start anew"
            )
        if moved:
            say(f"note: {partial} goes on with what is not as before: {moved}")
            self._write_settings(path, {**before, **begun, "resumed_with": [*others, dict(origin)]})

    def complete_lines(self, say: Say) -> Iterator[bytes]:
        """Yield all complete lines, one by one. A torn last line is dropped from the file."""
        end = 0
        self.file.seek(0)
        for line in self._lines():
            if not line.endswith(b"\n"):
                say(f"the last line of {self.names.partial} is torn; it is made again")
                break
            end += len(line)
            yield line
        self.file.seek(end)
        self.file.truncate()

    def _lines(self) -> Iterator[bytes]:
        try:
            yield from (line for _, line in numbered(self.file, MOST_LINE_BYTES))
        except InvalidLine as error:
            raise OutputError(f"{self.names.partial}, {error}; remove it and start anew") from error

    def append(self, lines: bytes) -> None:
        """Write `lines`, to the disk."""
        try:
            storage.append(self.file, lines)
        except OSError as error:
            raise OutputError(
                f"{self.names.partial} cannot be written: {reason_of(error)}; go on with {self.names.way_on} once "
                "that is mended"
            ) from error

    @property
    def size(self) -> int:
        """Count the bytes of the partial file."""
        return os.fstat(self.file.fileno()).st_size

    @property
    def is_there(self) -> bool:
        """True while the partial file has its name."""
        return is_at(self.file, self.names.partial)

    def check_written(self, size: int) -> None:
        """Raise OutputError unless the file has its name and exactly the `size` written bytes."""
        if not self.is_there:
            raise OutputError(
                f"{self.names.partial} was moved or removed while it was written; put it back and go on with "
                f"{self.names.way_on}, or start anew with --force"
            )
        if self.size != size:
            raise self._has_not(size)

    def check_holds(self, size: int) -> None:
        """Raise OutputError if the file has fewer than `size` bytes."""
        if self.size < size:
            raise self._has_not(size)

    def _has_not(self, size: int) -> OutputError:
        return OutputError(
            f"{self.names.partial} has {self.size} bytes, and {size} were written; remove it and start anew"
        )

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes, behind which `append` goes on. Raises OutputError if there are fewer."""
        self.check_holds(size)
        self.file.seek(size)
        self.file.truncate()

    def remove(self) -> None:
        """Leave nothing of the run."""
        self.names.partial.unlink()
        forget(self.names, keeps_settings=self.names.status is not None)

    def finish(self) -> None:
        """Give the complete file its name, and its settings theirs: first, as a run that is stopped here goes on."""
        if self._settings != self.names.settings:
            try:
                storage.rename(self._settings, self.names.settings)
            except OSError as error:
                raise _unwritten(self.names.settings, error) from error
        self.take_name()

    def take_name(self) -> None:
        """Give the complete file its name. It has no settings."""
        partial, target, status = self.names.partial, self.names.target, self.names.status
        if status is not None:
            replacement.replace(self.file, partial, target, status, is_written_over=self.is_written_over)
            return
        if os.path.lexists(target):
            raise OutputError(f"{target} has appeared meanwhile; move it away, and finish with --resume")
        storage.rename(partial, target)

    @property
    def _settings(self) -> Path:
        """The settings of the run that began."""
        new = self.names.new_settings
        return new if os.path.lexists(new) else self.names.settings

    def _write_settings(self, path: Path, document: Mapping[str, Any]) -> None:
        try:
            write_alone(path, document)
        except (OSError, ValueError) as error:
            raise _unwritten(path, error) from error


def _unwritten(path: Path, error: Exception) -> OutputError:
    return OutputError(f"{path} cannot be written: {reason_of(error)}")


def _close(file: BinaryIO) -> None:
    """Close; a full disk fails again for what the buffer still holds, and was told already."""
    with contextlib.suppress(OSError):
        file.close()
