"""Name the files of a run, which lie beside its output while it is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cappy_engine.bulk.formats.file_format import check_name
from cappy_engine.bulk.output.places import Input, Place, check_output
from cappy_engine.errors import OutputError

OTHER_NAME = "choose another name, or replace it with --force"
"""What to do where a file that a user named is in the way."""
OTHER_FOLDER = "move or remove it, choose another folder, or replace it with --force"
"""The same where only its folder was named."""


def new_of(path: Path) -> Path:
    """Name the file that takes the place of `path`.

    >>> new_of(Path("scored.jsonl.settings.json")).name
    'scored.jsonl.settings.json.new'
    """
    return path.with_name(f"{path.name}.new")


@dataclass(frozen=True)
class Names:
    """The files of a run. `target` appears when all is complete; `settings` may stay beside it.

    `status` is that of a target that is there and will be replaced, else None. `is_forced` if what a stopped run left
    is removed.

    >>> Names(Path("out.jsonl")).partial
    PosixPath('out.jsonl.partial')
    """

    target: Path
    status: os.stat_result | None = None
    is_forced: bool = False

    @property
    def partial(self) -> Path:
        """The file that grows."""
        return self.target.with_name(self.target.name + ".partial")

    @property
    def is_partial_empty(self) -> bool:
        """True if the partial file is empty: its run was killed as it began."""
        status = self.partial.lstat()
        return stat.S_ISREG(status.st_mode) and not status.st_size

    @property
    def settings(self) -> Path:
        """The settings of the complete file, as JSON, and of a run that replaces none."""
        return self.target.with_name(self.target.name + ".settings.json")

    @property
    def new_settings(self) -> Path:
        """Name the settings of a run whose file will replace another file. That file keeps its own until then."""
        return self.target.with_name(self.partial.name + ".settings.json")

    @property
    def progress(self) -> Path:
        """How far the run is, as JSON, where the file itself does not tell."""
        return self.target.with_name(self.target.name + ".progress.json")

    @property
    def beside(self) -> tuple[Path, ...]:
        """Every file beside the partial one, in the order of removal: the progress file tells of the end."""
        settings = (self.settings, new_of(self.settings), self.new_settings, new_of(self.new_settings))
        return (*settings, new_of(self.progress), self.progress)

    @property
    def way_on(self) -> str:
        """The options with which the run goes on after a stop."""
        return "--resume --force" if self.is_forced else "--resume"

    @property
    def made(self) -> Path:
        """The complete file while it is made, if it is not the partial one."""
        return self.target.with_name(self.target.name + ".made")


def find_names(out: Path, *, resume: bool = False, force: bool = False, inputs: Sequence[Input] = ()) -> Names:
    """Name the files of a run that writes `out`; links are followed.

        >>> find_names(Path("new.jsonl")).partial.name
        'new.jsonl.partial'

    Raises OutputError if a file would be overwritten without `force`, if `out` is one of the `inputs`, or not a file,
    or if there is nothing to resume.
    """
    place = check_output(out, force=True, inputs=inputs)
    names = Names(place.path, place.status, force)
    if not (force or place.is_stream) and place.status is not None and os.path.lexists(names.partial):
        both = os.path.lexists(names.new_settings) and os.path.lexists(names.settings)
        raise OutputError(
            f"{out} exists beside what a stopped run left; move it{f' and {names.settings}' * both} away and go on "
            "with --resume, or have it replaced with --resume --force (--force alone starts anew)"
        )
    check_output(out, force=force, inputs=inputs)
    if place.is_stream:
        raise OutputError(f"{out} is not a file, and a run could not go on with it; name a file")
    if resume and not names.partial.is_file():
        raise OutputError(f"there is nothing to resume: {names.partial} does not exist; leave out --resume")
    if not (resume or force) and os.path.lexists(names.partial):
        raise OutputError(
            f"{names.partial} holds what a stopped run left, or one that still writes; go on with --resume, or replace "
            "it with --force"
        )
    return names


def find_run(
    out: Path, *, resume: bool = False, force: bool = False, inputs: Sequence[Input] = (), way_out: str = OTHER_NAME
) -> tuple[Names, bool]:
    """Name a run's files, and tell if it goes on with a stopped run.

    With `resume` it goes on if the partial file of a stopped run is left; any other run begins anew.

        >>> find_run(Path("new.jsonl"), resume=True)[1]
        False

    Raises the errors of `find_names`; `way_out` is the advice where `out` does not belong to a stopped run.
    """
    found = find_names(out, force=True, inputs=inputs)
    is_there = resume and os.path.lexists(found.partial)
    if resume and not (is_there or force) and found.status is not None:
        raise OutputError(
            f"{out} exists, and no stopped run is left to go on with: it is complete already, or not of this run; "
            f"{way_out}"
        )
    return find_names(out, resume=is_there, force=force, inputs=inputs), is_there


def find_rejects(rejects: Path, *, resume: bool, force: bool, inputs: Sequence[Input] = ()) -> Names:
    """Name the files of bad rows, as `find_names` does.

        >>> find_rejects(Path("bad.jsonl"), resume=False, force=False).partial
        PosixPath('bad.jsonl.partial')

    Raises OutputError, which names the option if the file is there.
    """
    if not force and find_names(rejects, force=True, inputs=inputs).status is not None:
        raise OutputError(
            f"{rejects} exists, and bad rows go to a new file; move or remove it, choose another name for --rejects, "
            "or replace it and OUT with --force"
        )
    return find_names(rejects, resume=resume, force=force, inputs=inputs)


def check_rejects(rejects: Path, out: Path | Place) -> None:
    """Raise OutputError if results and bad rows would be written to the same file.

    Also raises the errors of `check_name`.

    >>> check_rejects(Path("bad.jsonl"), Path("scored.jsonl"))
    """
    check_name(rejects)
    bad, good = check_output(rejects, force=True), out if isinstance(out, Place) else check_output(out, force=True)
    is_one = bad.descriptor is not None and bad.descriptor == good.descriptor
    if bad.status is None or not stat.S_ISCHR(bad.status.st_mode):  # a terminal, or /dev/null, may get both
        is_one |= bad.path == good.path
        if bad.status is not None and good.status is not None:
            is_one |= os.path.samestat(bad.status, good.status)
    if is_one:
        name = rejects if good.is_stream else good.path
        raise OutputError(f"--rejects and -o are both {name}; choose another name")
    if bad.is_stream or good.is_stream:
        return
    kept, own = Names(bad.path), Names(good.path)
    for path in (kept.target, kept.partial):
        if path in (own.target, own.partial, own.made, *own.beside):
            raise OutputError(f"--rejects {rejects} and -o {good.path} both need {path}; choose another name")
