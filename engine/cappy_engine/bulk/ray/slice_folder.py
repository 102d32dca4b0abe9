"""Keep a job's results in a folder, which has its name when all is there. Knows no cluster.

OUT.partial holds the file of every slice, whole or not at all, and beside each a hidden one that says what was counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cappy_engine import storage
from cappy_engine.bulk.folders import Folder
from cappy_engine.bulk.ray.slices import Slice
from cappy_engine.bulk.totals import Totals
from cappy_engine.errors import CappyError, OutputError, reason_of
from cappy_engine.nodes import BundleOfNodes

JOB, LOCK, TRIES, DONE = ".job.json", ".job.lock", ".tries", ".done.json"
"""Hidden files: which job a folder is of, who works on it, how often a slice was begun, and that it is done."""
MOST_TRIES = 5
"""A slice is begun at most this often. Ray would repeat one that kills its worker for ever."""
MOST_DONE_BYTES = 2**16


@dataclass(frozen=True)
class SliceDone:
    """What was counted of a slice, and the size of its file.

    >>> SliceDone(1042, Totals(pairs=7).marked()).totals["pairs"]
    7
    """

    bytes: int
    totals: Mapping[str, int]


def check_folders_apart(rejected: Path, target: Path) -> None:
    """Raise OutputError if the folders of results and of bad rows are in one another.

    >>> check_folders_apart(Path("bad"), Path("scored"))
    """
    bad = rejected.resolve()
    for out in (target.resolve(), _unfinished(target).resolve()):
        if bad.is_relative_to(out) or out.is_relative_to(bad):
            raise OutputError(
                f"{rejected} and {target} are one, or one in the other; choose a folder beside it for bad rows"
            )


def describe_job(
    slices: Sequence[Slice], nodes: BundleOfNodes, job: Folder, rejected: Path | None = None
) -> dict[str, Any]:
    """Tell jobs apart: by input, bundle, and options that change more than last digits.

    >>> describe_job(slices, BundleOfNodes.of("cappy-bundle", ScorerOptions()), job)["precision"]
    'auto'
    """
    work = json.dumps([dataclasses.astuple(part) for part in slices])
    return {
        "input": hashlib.sha256(work.encode()).hexdigest(),
        "bundle": nodes.digest,
        "device": nodes.options.device,
        "precision": nodes.options.precision,
        "max_text_chars": nodes.options.max_text_chars,
        "too_long": job.options.too_long,
        "task": type(job.task).__name__,
        "columns": dataclasses.asdict(job.task),  # type: ignore[call-overload]  # all tasks are
        "rejects": None if rejected is None else str(rejected),
    }


@contextlib.contextmanager
def open_folder(target: Path, job: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
    """Make the folder of a job, or with `resume` find that of a stopped one.

        >>> with open_folder(Path("scored"), job, resume=False) as folder:
        ...     print(folder)
        scored.partial

    Raises OutputError for a folder that is there already, is of another job, or is worked on by another process.
    """
    if os.path.lexists(target):
        done = ", so it is complete, or not of this job" if resume else ""
        raise OutputError(f"{target} exists already{done}; a job writes a new folder. Remove it, or name another one")
    unfinished = _unfinished(target)
    is_new = not os.path.lexists(unfinished)
    if is_new:
        _check_rejects(job)
        unfinished.mkdir(parents=True)
        storage.write_json(unfinished / JOB, job)
    elif not resume:
        raise OutputError(f"{unfinished} is of a job that runs or was stopped; go on with --resume, or remove it")
    else:
        _check_job(unfinished, job)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(storage.locked(unfinished / LOCK, wait=False))
        except BlockingIOError as error:
            raise OutputError(f"another process works on {unfinished}; wait until it ends") from error
        for file in list(unfinished.rglob(f".*{TRIES}")):
            file.unlink()
        yield unfinished


def count_try(folder: Path, part: Slice) -> None:
    """Count that a slice is begun. Raises CappyError if that was done too often: it loses its worker each time.

    >>> count_try(Path("scored.partial"), slices[0])
    """
    file = _beside(folder, part, TRIES)
    file.parent.mkdir(parents=True, exist_ok=True)
    with storage.naming(file), file.open("ab") as tries:
        tries.write(b".")
        count = tries.tell()
    if count > MOST_TRIES:
        raise CappyError(
            f"{part}: the worker was lost {MOST_TRIES} times while it scored them; is there enough memory? Go on with "
            "--resume when that is mended"
        )


def note_done(folder: Path, part: Slice, totals: Totals) -> SliceDone:
    """Write down that a slice is done, when its file is there.

    >>> note_done(Path("scored.partial"), slices[0], Totals(pairs=7)).bytes
    1042
    """
    done = SliceDone((folder / part.out).stat().st_size, totals.marked())
    storage.write_json(_beside(folder, part, DONE), dataclasses.asdict(done))
    return done


def read_done(folder: Path, part: Slice) -> SliceDone | None:
    """Read what an earlier run counted of a slice. None if it is not done, or its file is another one.

    >>> read_done(Path("scored.partial"), slices[0]).totals["pairs"]
    7
    """
    try:
        done = SliceDone(**json.loads(storage.read_regular(_beside(folder, part, DONE), limit=MOST_DONE_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return done if _is_there(folder, part, done) else None


def finish_folder(unfinished: Path, target: Path, slices: Sequence[Slice], done: Mapping[str, SliceDone]) -> None:
    """Give a folder its name, if every slice is there. All other files are removed.

        >>> finish_folder(Path("scored.partial"), Path("scored"), slices, done)

    `done` are the slices by their names. Raises OutputError where files lack.
    """
    lost = [part.out for part in slices if part.out not in done or not _is_there(unfinished, part, done[part.out])]
    if lost:
        raise OutputError(
            f"{unfinished} lacks {len(lost)} of {len(slices)} files, the first is {lost[0]}; do all nodes see this "
            "folder, as the same one? Go on with --resume when they do"
        )
    expected = {unfinished / part.out for part in slices}
    for file in [path for path in unfinished.rglob("*") if path.is_file() and path not in expected]:
        file.unlink()
    storage.sync_tree(unfinished)
    storage.rename(unfinished, target)


def _unfinished(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _check_rejects(job: Mapping[str, Any]) -> None:
    if job["rejects"] is not None and os.path.lexists(job["rejects"]):
        raise OutputError(
            f"{job['rejects']} exists already; bad rows go to a new folder. Remove it, or name another one"
        )


def _check_job(unfinished: Path, job: Mapping[str, Any]) -> None:
    """Raise OutputError unless a folder is of this job. One without a folder for bad rows may get one."""
    try:
        before = dict(json.loads((unfinished / JOB).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{unfinished} is not of a job that can be resumed ({reason_of(error)}); remove it"
        ) from error
    if before.get("rejects", "") is None and job["rejects"] is not None:
        _check_rejects(job)
        before["rejects"] = job["rejects"]
        storage.write_json(unfinished / JOB, before)
    changed = [name for name, value in job.items() if before.get(name) != value]
    if changed:
        raise OutputError(
            f"{unfinished} is of another job: not the same {' and '.join(changed)}; remove it, or name another folder"
        )


def _is_there(folder: Path, part: Slice, done: SliceDone) -> bool:
    try:
        return (folder / part.out).stat().st_size == done.bytes
    except FileNotFoundError:
        return False


def _beside(folder: Path, part: Slice, suffix: str) -> Path:
    file = folder / part.out
    return file.with_name(f".{file.name}{suffix}")
