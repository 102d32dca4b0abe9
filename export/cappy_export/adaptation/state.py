"""Keep the folder of a training that is not finished: made, locked, gone on with, or cleared."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine import storage
from cappy_engine.bulk.resume.settings import changes
from cappy_engine.errors import AdaptError

SETTINGS, STEP = "settings.json", "step-"
MOST_BYTES = 2**20


def look(folder: Path, *, force: bool, resume: bool) -> None:
    """Raise AdaptError if a training cannot begin with this folder, or go on with it: before hours of reading.

        >>> look(Path("my-cappy.training"), force=False, resume=False)

    It can begin if there is none. With `force`, it may be one that a stopped training left.
    """
    is_ours = (folder / SETTINGS).is_file()
    if resume and not is_ours:
        raise AdaptError(f"there is nothing to resume: {folder} does not exist; leave out --resume")
    if resume or not os.path.lexists(folder):
        return
    if not is_ours or (force and folder.is_symlink()):
        raise AdaptError(f"{folder} is in the way, and not of a training; move or remove it")
    if not force:
        raise AdaptError(f"{folder} holds a training that was stopped; go on with --resume, or replace it with --force")


def begin(folder: Path, settings: Mapping[str, Any], *, force: bool) -> BinaryIO:
    """Make the folder of a new training, and lock it until the file that is returned is closed.

        >>> held = begin(Path("my-cappy.training"), settings, force=False)

    With `force`, a folder that a stopped training left is removed first. Raises AdaptError if there is one without
    `force`, if it belongs to a training that runs, and for anything else of that name.
    """
    look(folder, force=force, resume=False)
    if folder.exists():
        with _lock(folder):
            shutil.rmtree(folder)
    folder.mkdir(parents=True)
    storage.write_json(folder / SETTINGS, settings)
    return _lock(folder)


def go_on(folder: Path, settings: Mapping[str, Any]) -> BinaryIO:
    """Lock the folder of a stopped training until the file that is returned is closed.

        >>> held = go_on(Path("my-cappy.training"), settings)

    Raises AdaptError if there is none, if it belongs to a training that runs, or to one with other settings.
    """
    look(folder, force=False, resume=True)
    try:
        changed = changes(json.loads(storage.read_regular(folder / SETTINGS, limit=MOST_BYTES)), settings)
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdaptError(f"{folder / SETTINGS} is not of a training ({error!r}); remove the folder") from error
    if changed:
        raise AdaptError(f"{folder} belongs to another training ({changed}); it can only go on as it began")
    return _lock(folder)


def states(folder: Path) -> dict[int, Path]:
    """Find the saved states, by the number of steps that were done.

    >>> states(Path("my-cappy.training"))
    {200: PosixPath('my-cappy.training/step-200')}
    """
    return {int(path.name.removeprefix(STEP)): path for path in folder.glob(f"{STEP}*")}


def tell_what_is_kept(folder: Path) -> str:
    """Tell how to go on with a training that was stopped.

    >>> tell_what_is_kept(Path("my-cappy.training"))
    'the state of step 200 is kept in my-cappy.training; go on with --resume'
    """
    kept = states(folder)
    if not kept:
        return f"no state was saved yet; {folder} can be removed, or the training starts again with --resume"
    return f"the state of step {max(kept)} is kept in {folder}; go on with --resume"


def _lock(folder: Path) -> BinaryIO:
    """Open and lock a folder's settings. Raises AdaptError if another process holds the lock."""
    file = (folder / SETTINGS).open("rb")
    is_ours = True
    with contextlib.suppress(OSError):  # a file system without locks
        is_ours = storage.lock(file.fileno())
    if not is_ours:
        file.close()
        raise AdaptError(f"another training writes to {folder}; wait for it, stop it, or choose another name")
    return file
