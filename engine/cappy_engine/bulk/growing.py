"""Let a file of lines grow as OUT.partial, batch by batch, and go on after a stop.

A line counts once it is on the disk, up to its newline. OUT.settings.json keeps the settings that decide the lines: a
run goes on only with those it began with. Its origin (versions, input) may change, and every change is kept. Knows
nothing of what the lines hold.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine import storage
from cappy_engine.errors import OutputError

Say = Callable[[str], object]


@dataclass(frozen=True)
class Names:
    """The three files of a run: `target` appears at the end, when all is complete; `settings` stays beside it.

    >>> Names(Path("out.jsonl")).partial
    PosixPath('out.jsonl.partial')
    """

    target: Path

    @property
    def partial(self) -> Path:
        """The file that grows."""
        return self.target.with_name(self.target.name + ".partial")

    @property
    def settings(self) -> Path:
        """The settings of the run, as JSON."""
        return self.target.with_name(self.target.name + ".settings.json")


def check_names(names: Names, *, resume: bool) -> None:
    """Raise OutputError if a file would be overwritten, or there is nothing to resume.

    >>> check_names(Names(Path("new.jsonl")), resume=False)
    """
    if os.path.lexists(names.target):
        raise OutputError(f"{names.target} exists; choose another name, or remove it")
    if resume and not names.partial.is_file():
        raise OutputError(f"there is nothing to resume: {names.partial} does not exist; leave out --resume")
    if not resume and os.path.lexists(names.partial):
        raise OutputError(f"{names.partial} holds what a stopped run left; go on with --resume, or remove it")


@contextlib.contextmanager
def open_growing(names: Names, *, resume: bool) -> Iterator[Growing]:
    """Open the partial file, new or to go on with, and lock it: two runs must not write to it at once.

        >>> with open_growing(Names(Path("out.jsonl")), resume=False) as growing:
        ...     growing.begin({"seed": 0}, {"versions": {}})
        ...     growing.append(b"{}\\n")
        ...     growing.finish()

    Raises OutputError if that cannot be done.
    """
    try:
        names.partial.parent.mkdir(parents=True, exist_ok=True)
        file = names.partial.open("r+b" if resume else "x+b")
    except OSError as error:
        raise OutputError(f"{names.partial} cannot be written: {error}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(_close, file)
        try:
            stack.enter_context(storage.locked(names.partial, wait=False))
        except BlockingIOError as error:
            raise OutputError(f"another run writes to {names.partial}; wait for it, or stop it") from error
        except OSError as error:
            if not resume:
                names.partial.unlink()
            raise OutputError(
                f"{names.partial} cannot be locked: {error}; choose a folder on a file system that has locks"
            ) from error
        yield Growing(names, file)


@dataclass(frozen=True)
class Growing:
    """An open, locked partial file; `open_growing` makes one. Every method raises OutputError."""

    names: Names
    file: BinaryIO

    def begin(self, settings: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        """Write the settings of a new run; a run may go on with another `origin`."""
        try:
            self._write_settings({**settings, **origin})
        except OutputError:
            self.names.partial.unlink()
            raise

    def check_settings(self, settings: Mapping[str, Any], origin: Mapping[str, Any], say: Say) -> None:
        """Raise an error that names all settings that are not as the run began.

        Another `origin` may go on: that is said, and added to the settings as an entry of "resumed_with".
        """
        partial = self.names.partial
        try:
            before = json.loads(self.names.settings.read_bytes())
            others = before.pop("resumed_with", [])
            begun = {name: before.pop(name) for name in origin}
            changed = changes(before, settings)
            moved = changes(others[-1] if others else begun, origin)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutputError(f"{partial} has lost its settings ({error!r}); remove it and start anew") from error
        if changed:
            raise OutputError(
                f"{partial} belongs to another run ({changed}); go on as it began, or remove it and start anew"
            )
        if moved:
            say(f"note: {partial} goes on with what is not as before: {moved}")
            self._write_settings({**before, **begun, "resumed_with": [*others, dict(origin)]})

    def complete_lines(self, say: Say) -> Iterator[bytes]:
        """Yield all complete lines, one by one; a torn last line is dropped from the file."""
        end = 0
        self.file.seek(0)
        for line in self.file:
            if not line.endswith(b"\n"):
                say(f"the last line of {self.names.partial} is torn; it is made again")
                break
            end += len(line)
            yield line
        self.file.seek(end)
        self.file.truncate()

    def append(self, lines: bytes) -> None:
        """Write `lines`, to the disk."""
        try:
            storage.append(self.file, lines)
        except OSError as error:
            raise OutputError(
                f"{self.names.partial} cannot be written: {error}; go on with --resume once that is mended"
            ) from error

    def remove(self) -> None:
        """Leave nothing of the run."""
        self.names.partial.unlink()
        self.names.settings.unlink()

    def finish(self) -> None:
        """Give the complete file its name."""
        if os.path.lexists(self.names.target):
            raise OutputError(f"{self.names.target} has appeared meanwhile; move it away, and finish with --resume")
        storage.rename(self.names.partial, self.names.target)

    def _write_settings(self, document: Mapping[str, Any]) -> None:
        try:
            storage.write_json(self.names.settings, document)
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.names.settings} cannot be written: {error}") from error


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Name the settings, of any depth, that differ; empty if none does.

    >>> changes({"recipe": {"seed": 0}}, {"recipe": {"seed": 1}})
    'recipe.seed was 0, is 1'
    """
    old, new = _flat(before), _flat(json.loads(json.dumps(after)))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _close(file: BinaryIO) -> None:
    """Close; a full disk fails again for what the buffer still holds, and was told already."""
    with contextlib.suppress(OSError):
        file.close()
