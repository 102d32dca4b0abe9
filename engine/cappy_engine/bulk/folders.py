"""Score or rank many files, each into a file of its name in a folder.

FOLDER/cappy.run.json lists the files that are complete, until all are (`run_list`). A run that goes on leaves these
alone, and goes on within the file that was not complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cappy_engine.bulk.formats.entries import Reading
from cappy_engine.bulk.formats.file_format import format_of, is_known
from cappy_engine.bulk.formats.sources import open_source
from cappy_engine.bulk.input_files import Files
from cappy_engine.bulk.resume.names import OTHER_FOLDER, Names, find_names
from cappy_engine.bulk.resume.run_list import RUN, Complete, RunList, read_complete
from cappy_engine.bulk.resume.settings import changes
from cappy_engine.bulk.resume.side_files import forget
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Say, Target, finished
from cappy_engine.bulk.score_file import score_file, settings_of
from cappy_engine.bulk.tasks import ScoreTask, Task
from cappy_engine.bulk.totals import Progress, Totals
from cappy_engine.errors import CappyError, OutputError, reason_of
from cappy_engine.scorer import Scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """Gives each file to read its name in the folder `out`.

    `task` and `options` say how rows are handled.

    >>> Folder(files_of_folder(Path("samples")), Path("scored")).task.score_field
    'score'
    """

    files: Sequence[tuple[Path, Path]]
    out: Path
    task: Task = field(default_factory=ScoreTask)
    options: RowOptions = field(default_factory=RowOptions)


def files_of_folder(folder: Path, outputs: Sequence[Path] = (), *, say: Say = log.warning) -> list[tuple[Path, Path]]:
    """List the files of rows in a folder and below, with their names there.

        >>> files_of_folder(Path("samples"))[0]
        (PosixPath('samples/part-0001.parquet'), PosixPath('part-0001.parquet'))

    Files that a run keeps beside an output are left out. Left out with a note to `say` are hidden files, those in
    hidden folders, empty CSV files, and names that tell no format. Links are followed. Raises CappyError if there is no
    such file, or one cannot be read, and OutputError if one of the `outputs` would be one of them the next time.
    """
    found: list[Path] = []
    hidden: list[Path] = []
    others: list[Path] = []
    left = [(folder, tuple(each.stat() for each in folder.resolve().parents))]
    while left:
        inner, above = left.pop()
        if inner == folder or inner.is_symlink():
            _check_outside(inner, outputs)
        with _readable(inner):
            status, entries = inner.stat(), list(inner.iterdir())
        if any(os.path.samestat(status, each) for each in above):
            raise CappyError(f"{inner} leads back to a folder that it is in; remove the link")
        for path in entries:
            if path.name.startswith("."):
                hidden += _rows_at(path)
                continue
            with _readable(path):
                if path.is_dir():
                    left.append((path, (*above, status)))
                elif not is_known(path):
                    others.append(path)
                elif not _is_ours(path):
                    found.append(path)
    files = checked_files(found)
    empty = set(filter(_is_empty, files))
    if len(files) == len(empty):
        left_out = [("hidden ones", hidden), ("empty ones", list(empty)), ("others", others)]
        but = next((f" but {kind}, which are not read: {_listed(paths)}" for kind, paths in left_out if paths), "")
        raise CappyError(f"{folder} holds no file of rows (.jsonl, .csv, .parquet, packed or not){but}")
    for paths, note in (
        (hidden, "hidden files of rows are not read: {}; one that is given by its name is"),
        (list(empty), "empty files of CSV hold no rows, and are left out: {}"),
        (others, "files whose names do not tell rows are not read: {}"),
    ):
        if paths:
            say(f"note: {note.format(_listed(paths))}")
    return [(path, path.relative_to(folder)) for path in files if path not in empty]


def checked_files(paths: Iterable[Path]) -> list[Path]:
    """Sort the files that were found by their names.

        >>> checked_files([Path("samples/part-0002.parquet"), Path("samples/part-0001.parquet")])[0]
        PosixPath('samples/part-0001.parquet')

    Raises CappyError for a link that leads nowhere and for anything else that is not a file. None is left out.
    """
    found = sorted(paths)
    for path in found:
        with _readable(path):
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError(errno.EINVAL, "it is not a file")
    return found


def _is_empty(path: Path) -> bool:
    """True for a file of CSV without even the names of columns. Of other formats it has no rows, or is damaged."""
    form = format_of(path)
    return form.kind == "csv" and not form.packing and not path.stat().st_size


def _listed(paths: Sequence[Path]) -> str:
    """Name the first of some files, and how many more there are."""
    return f"{min(paths)}{f' and {len(paths) - 1} more' * (len(paths) > 1)}"


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CappyError(f"{path} cannot be read: {reason_of(error)}; mend it, or move it away") from error


def _rows_at(path: Path) -> list[Path]:
    """List a hidden file of rows, or those in a hidden folder. What cannot be listed there is left out."""
    below = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    return [each for each in below or [path] if is_known(each) and not _is_ours(each)]


def _check_outside(folder: Path, outputs: Sequence[Path]) -> None:
    for output in outputs:
        if output.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{output} is in the input folder {folder}; choose a folder beside it")


def _is_ours(path: Path) -> bool:
    """Tell if a run keeps this file beside its output. `cappy sample` leaves such files there."""
    name = path.name.removesuffix(".json").removesuffix(".settings").removesuffix(".progress")
    names = Names(path.with_name(name.removesuffix(".partial")))
    is_beside = path in (names.settings, names.new_settings, names.progress)
    return path.name == RUN or (is_beside and is_known(names.target))


def score_folder(
    scorer: Scorer, folder: Folder, target: Target, *,
    say: Say = log.warning, progress: Progress = lambda totals: None,
) -> Totals:  # fmt: skip
    """Score or rank files into a folder. Without `Target.force` or `resume` none of them may be there yet.

    >>> score_folder(scorer, Folder(files_of_folder(samples), scored, ScoreTask(), RowOptions()), target).pairs
    7
    """
    twice = [name for name, times in Counter(name for _, name in folder.files).items() if times > 1]
    if twice:
        raise CappyError(f"two inputs are called {twice[0]}; give them in two commands")
    if target.rejects is not None:
        _check_rejects_are_no_outputs(folder, target.rejects)
    found = read_complete(folder.out)  # a file of that name which is not of such a run is not written over
    listed = RunList(folder.out, found if target.resume else {})
    if not (target.resume or target.force):
        there = next((folder.out / name for _, name in folder.files if (folder.out / name).exists()), None)
        if there is not None:
            raise OutputError(f"{there} exists; choose another folder, go on with --resume, or replace it with --force")
    if target.resume and not (target.force or found):
        _check_not_complete(folder)
    _check_tables(folder, listed)
    totals = Totals(bytes_total=sum(path.stat().st_size for path, _ in folder.files))
    for path, name in folder.files:
        files = Files([path], folder.task, folder.options, are_named=True)
        rejects = None if target.rejects is None else _rejects_of(name, target.rejects)
        one = dataclasses.replace(target, out=folder.out / name, rejects=rejects, way_out=OTHER_FOLDER)
        totals.add(_score_listed(scorer, files, one, listed, str(name), say, _adding(totals, progress)))
    listed.remove()
    return totals


def _check_tables(folder: Folder, listed: RunList) -> None:
    """Raise CappyError for a table that is damaged or lacks a column. Its turn may come hours later."""
    for path, name in folder.files:
        if str(name) not in listed.complete and format_of(path).kind != "jsonl":
            with _readable(path), open_source(path, Reading(folder.task, folder.options.max_line_bytes)):
                pass


def _check_not_complete(folder: Folder) -> None:
    """Raise OutputError if every output is there, and nothing of a run that was stopped."""
    runs = (find_names(folder.out / name, force=True) for _, name in folder.files)
    if all(run.status is not None and not any(map(os.path.lexists, (run.partial, *run.beside))) for run in runs):
        raise OutputError(
            f"{folder.out} is complete already: all files, {len(folder.files)}, are there, and no stopped run is left "
            "to go on with; choose another folder, or replace them with --force"
        )


def _score_listed(
    scorer: Scorer, files: Files, target: Target, listed: RunList, name: str, say: Say, progress: Progress
) -> Totals:
    """Score a file, and list it by its name once it is complete. One that is listed, and there, is not scored again."""
    before = listed.complete.get(name)
    if before is not None:
        settings = settings_of(scorer, files, format_of(target.out))
        if _is_as_written(target.out, before, settings, say):
            _forget_killed(target, settings)
            return Totals.going_on(before.totals)

    def done(totals: Totals, settings: Mapping[str, Any]) -> None:
        listed.add(name, Complete(settings, totals.marked(), target.out.stat().st_size))

    return score_file(scorer, files, dataclasses.replace(target, done=done), say=say, progress=progress)


def _rejects_of(name: Path, rejects: Path) -> Path:
    return rejects / f"{name}.rejects.jsonl"


def _check_rejects_are_no_outputs(folder: Folder, rejects: Path) -> None:
    """Raise OutputError if one file's bad rows would go to another file's output."""
    outputs = {folder.out.resolve() / name for _, name in folder.files}
    found = next(
        (_rejects_of(name, rejects) for _, name in folder.files if _rejects_of(name, rejects.resolve()) in outputs),
        None,
    )
    if found is not None:
        raise OutputError(f"{found} is an output too; choose another folder for --rejects")


def _adding(so_far: Totals, progress: Progress) -> Progress:
    """Tell of one file's totals with those of the files before it."""

    def tell(totals: Totals) -> None:
        both = dataclasses.replace(so_far, skipped=[])
        both.add(totals)
        progress(both)

    return tell


def _forget_killed(target: Target, settings: Mapping[str, Any]) -> None:
    """Remove the files that a killed run left beside a listed file.

    Such a run was killed after it had listed the file, and before it had removed them.
    """
    target = dataclasses.replace(target, out=find_names(target.out, force=True).target)
    if finished(target, settings):
        forget(Names(target.out))


def _is_as_written(out: Path, before: Complete, settings: Mapping[str, Any], say: Say) -> bool:
    """True if a listed file is there as it was written. False if it is gone. Raises OutputError."""
    changed = changes(before.settings, settings)
    if changed:
        raise OutputError(f"{out} was written with other settings or from another input ({changed}); start anew")
    try:
        size = out.stat().st_size
    except FileNotFoundError:
        say(f"{out} was complete, and is gone; it is written again")
        return False
    if size != before.bytes:
        raise OutputError(f"{out} has {size} bytes, and {before.bytes} were written; remove it, and go on")
    return True
