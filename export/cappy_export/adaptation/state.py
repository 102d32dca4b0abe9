"""Keep the folder of a training that is not finished: made, locked, gone on with, or cleared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine import storage
from cappy_engine.bulk.resume.settings import changes
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.log import LOG
from cappy_export.adaptation.recipe import Recipe
from cappy_export.options import Say

SETTINGS, STEP, UNFINISHED = "settings.json", "step-", "unfinished"
ENDING = ".training"
"""What the name of the folder has behind that of the result."""
MOST_BYTES = 2**20

log = logging.getLogger(__name__)


def look(folder: Path, *, force: bool, resume: bool) -> None:
    """Raise AdaptError if a training cannot begin with this folder, or go on with it: before hours of reading.

        >>> look(Path("my-cappy.training"), force=False, resume=False)

    It can begin if there is none, or one of a training that saved no state. With `force`, it may be of any training.
    """
    is_ours = (folder / SETTINGS).is_file()
    if resume and not is_ours:
        raise AdaptError(f"there is nothing to resume: {folder} does not exist; leave out --resume")
    if resume or not os.path.lexists(folder):
        return
    if not is_ours or (force and folder.is_symlink()):
        raise AdaptError(f"{folder} is in the way, and not of a training; move or remove it")
    if not force and not _is_blank(folder):
        raise AdaptError(f"{folder} holds a training that was stopped; go on with --resume, or replace it with --force")


def begin(folder: Path, settings: Mapping[str, Any], *, force: bool, say: Say = log.warning) -> BinaryIO:
    """Make the folder of a new training, and lock it.

        >>> held = begin(Path("my-cappy.training"), settings, force=False)

    The lock holds until the returned file is closed. The folder of a stopped training is removed first if it saved no
    state, or with `force`; `say` is told of a state that is removed. Raises AdaptError for any other folder of that
    name, also if it belongs to a training that runs.
    """
    look(folder, force=force, resume=False)
    if folder.exists():
        with _lock(folder):
            if kept := states(folder):
                say(f"note: --force starts anew: the state of step {max(kept)} in {folder} is removed")
            shutil.rmtree(folder)
    folder.mkdir(parents=True)
    storage.write_json(folder / SETTINGS, settings)
    return _lock(folder)


def go_on(folder: Path, settings: Mapping[str, Any]) -> BinaryIO:
    """Lock the folder of a stopped training until the file that is returned is closed.

        >>> held = go_on(Path("my-cappy.training"), settings)

    Without a saved state it is made anew. Raises AdaptError if there is none, if it belongs to a training that runs, or
    to one with other settings.
    """
    look(folder, force=False, resume=True)
    if _is_blank(folder):
        return begin(folder, settings, force=False)
    try:
        before = json.loads(storage.read_regular(folder / SETTINGS, limit=MOST_BYTES))
        recipe = {**dataclasses.asdict(Recipe()), **before.get("recipe", {})}  # an older version knew less of it
        changed = changes({**before, "recipe": recipe}, settings)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise AdaptError(f"{folder / SETTINGS} is not of a training ({error!r}); remove the folder") from error
    if changed:
        raise AdaptError(f"{folder} belongs to another training ({changed}); it can only go on as it began")
    held = _lock(folder)
    if not states(folder):
        (folder / LOG).unlink(missing_ok=True)
    return held


def states(folder: Path) -> dict[int, Path]:
    """Find the saved states, by the number of steps that were done; a copy such as step-200.bak is none.

    >>> states(Path("my-cappy.training"))
    {200: PosixPath('my-cappy.training/step-200')}
    """
    found = ((path.name.removeprefix(STEP), path) for path in folder.glob(f"{STEP}*"))
    return {int(number): path for number, path in found if re.fullmatch("0|[1-9][0-9]*", number)}


def tell_what_is_kept(folder: Path, *, force: bool = False) -> str:
    """Tell how to go on with a training that was stopped; `force` is that of `way_on`.

    >>> tell_what_is_kept(Path("my-cappy.training"))
    'the state of step 200 is kept in my-cappy.training; go on with --resume'
    """
    kept, options = states(folder), way_on(folder, force=force)
    if not kept:
        return f"no state was saved yet; {folder} can be removed, or the training starts again with {options}"
    return f"the state of step {max(kept)} is kept in {folder}; go on with {options}"


def way_on(folder: Path, *, force: bool) -> str:
    """Name the options with which a training goes on; `force` if it was told to replace what is there.

    >>> way_on(Path("my-cappy.training"), force=False)
    '--resume'
    """
    is_over = force and os.path.lexists(folder.with_name(folder.name.removesuffix(ENDING)))
    return "--resume --force" if is_over else "--resume"


def _is_blank(folder: Path) -> bool:
    """Tell whether a folder holds only the files of a training before its first state."""
    names = {path.name for path in folder.iterdir()}
    if folder.is_symlink() or not {SETTINGS} <= names <= {SETTINGS, LOG, UNFINISHED}:
        return False
    with contextlib.suppress(OSError, ValueError, RecursionError):  # others have a settings.json, too
        return "recipe" in json.loads(storage.read_regular(folder / SETTINGS, limit=MOST_BYTES))
    return False


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
