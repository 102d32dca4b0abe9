"""A file of lines that grows batch by batch and survives being stopped: OUT.partial, with its settings beside it.

A line counts once it is on the disk, up to its newline. A run goes on only with the settings it began with; where it
came from (versions, input) may change, and every change is kept. Knows nothing of what the lines hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.errors import SampleError


@dataclass(frozen=True)
class Names:
    """The three files of a run: `target` appears last, when all is complete; `settings` stays beside it."""

    target: Path

    @property
    def partial(self) -> Path:
        """Where lines are written."""
        return self.target.with_name(self.target.name + ".partial")

    @property
    def settings(self) -> Path:
        """What decides the lines."""
        return self.target.with_name(self.target.name + ".settings.json")


def check_names(names: Names, *, resume: bool) -> None:
    """Raise SampleError if there is something that would be overwritten, or nothing to resume."""
    if os.path.lexists(names.target):
        raise SampleError(f"{names.target} exists; choose another name, or remove it")
    if resume and not names.partial.is_file():
        raise SampleError(f"there is nothing to resume: {names.partial} does not exist; leave out --resume")
    if not resume and os.path.lexists(names.partial):
        raise SampleError(f"{names.partial} holds what a stopped run left; go on with --resume, or remove it")


@contextlib.contextmanager
def open_alone(names: Names, *, resume: bool) -> Iterator[BinaryIO]:
    """Open the partial file to read and write; two runs must not write to it at once."""
    try:
        names.partial.parent.mkdir(parents=True, exist_ok=True)
        file = names.partial.open("r+b" if resume else "x+b")
    except OSError as error:
        raise SampleError(f"{names.partial} cannot be written: {error}") from error
    try:
        _lock(file, names)
        yield file
    except BaseException:
        with contextlib.suppress(OSError):  # of what an error left in the buffer, and was told already
            file.close()
        raise
    file.close()


def _lock(file: BinaryIO, names: Names) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SampleError(f"another run writes to {names.partial}; wait for it, or stop it") from error
    except OSError as error:
        if not os.fstat(file.fileno()).st_size:  # made just now
            names.partial.unlink()
        raise SampleError(
            f"{names.partial} cannot be locked: {error}; choose a folder on a file system that has locks"
        ) from error


def begin(names: Names, settings: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Write the settings of a new run; what is in `origin` is kept besides, and does not keep a run from going on."""
    _write_json(names.settings, {**settings, **origin})


def check_settings(
    names: Names, settings: Mapping[str, Any], origin: Mapping[str, Any], say: Callable[[str], object]
) -> None:
    """Raise SampleError that names all settings which are not those that the partial file began with.

    An `origin` of its own may go on: that is said, and added to the settings as an entry of "resumed_with".
    """
    try:
        before = json.loads(names.settings.read_bytes())
        others = before.pop("resumed_with", [])
        begun = {name: before.pop(name) for name in origin}
        changed = _changes(before, settings)
        moved = _changes(others[-1] if others else begun, origin)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SampleError(f"{names.partial} has lost its settings ({error!r}); remove it and start anew") from error
    if changed:
        raise SampleError(
            f"{names.partial} belongs to another run ({changed}); go on as it began, or remove it and start anew"
        )
    if moved:
        say(f"note: {names.partial} goes on with what is not as before: {moved}")
        _write_json(names.settings, {**before, **begun, "resumed_with": [*others, dict(origin)]})


def complete_lines(file: BinaryIO, say: Callable[[str], object]) -> list[bytes]:
    """All complete lines; a torn last one is dropped from the file, which then stands at its end."""
    lines = file.readlines()
    if lines and not lines[-1].endswith(b"\n"):
        say(f"the last line of {file.name} is torn; it is made again")
        lines.pop()
    file.seek(sum(map(len, lines)))
    file.truncate()
    return lines


def append(file: BinaryIO, lines: bytes) -> None:
    """Write `lines`, to the disk."""
    try:
        file.write(lines)
        _flush(file)
    except OSError as error:
        raise SampleError(f"{file.name} cannot be written: {error}; go on with --resume once that is mended") from error


def remove(names: Names) -> None:
    """Leave nothing of a run."""
    names.partial.unlink()
    names.settings.unlink()


def finish(names: Names) -> None:
    """Give the complete file its name."""
    if os.path.lexists(names.target):
        raise SampleError(f"{names.target} has appeared meanwhile; move it away, and finish with --resume")
    names.partial.rename(names.target)
    _sync_folder(names.target)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What is not the same in both, as text; empty if all is."""
    old, new = _flat(before), _flat(json.loads(json.dumps(after)))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of any depth in one level: "sampler.dtype" and the like."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")
        _flush(file)
    unfinished.replace(path)
    _sync_folder(path)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
