"""Give a finished folder its name: complete, or not at all. Knows a kind of folder by one file in it."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cappy_engine import storage
from cappy_engine.errors import OutputError


@dataclass(frozen=True)
class Kind:
    """What a command makes: `name` says it with its article, `marker` is a file that every such folder holds.

    >>> Kind("a bundle", "manifest.json")
    """

    name: str
    marker: str


def check_folder(out: Path, kind: Kind, *, force: bool, inputs: Sequence[Path] = ()) -> Path:
    """Find where the folder `out` leads; raise OutputError if it must not be written.

    A folder that exists is replaced with `force` only, and only if it is of this `kind`. It is none of the `inputs`,
    holds none of them, and is in none of them. A link is followed, so that it leads to the new folder.

        >>> check_folder(Path("new-bundle"), Kind("a bundle", "manifest.json"), force=False)
        PosixPath('new-bundle')
    """
    if not os.path.lexists(out):
        return out
    if not force:
        raise OutputError(f"{out} exists; choose another name, or replace it with --force")
    found = Path(os.path.realpath(out))
    if not (found / kind.marker).is_file():
        raise OutputError(f"{out} exists and is not {kind.name} (it has no {kind.marker}); --force replaces no others")
    check_apart_from_inputs(out, inputs)
    if storage.is_mounted(found):
        raise OutputError(f"{out} is mounted, and cannot be replaced; name a new folder in it")
    return found


def check_space(out: Path, needed: int, what: str) -> None:
    """Raise OutputError if the file system of the folder `out` lacks space for `needed` bytes.

    The error says that `what` takes these bytes.

    >>> check_space(Path("new-bundle"), 1_421_500_000, "the fp32 model alone")
    """
    disk = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.exists()))
    if disk.total and disk.free < needed:  # some network file systems do not tell
        raise OutputError(
            f"the file system of {out.parent} has {disk.free / 1e6:,.1f} MB left, and {what} takes "
            f"{needed / 1e6:,.1f} MB; free some space, or write elsewhere"
        )


def check_apart_from_inputs(out: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if the folder `out` is, holds or lies in one of the `inputs`. Links are followed.

    >>> check_apart_from_inputs(Path("new-bundle"), [Path("my-checkpoint")])
    """
    found = Path(os.path.realpath(out))
    for each in inputs:
        for entry in (each, *_entries(each)):
            real = Path(os.path.realpath(entry))
            if found in (real, *real.parents) or (entry is each and real in found.parents):
                raise OutputError(f"{out} is, holds or lies in the input {entry}; choose another name")


@contextlib.contextmanager
def staging_folder(out: Path, say: Callable[[str], object]) -> Iterator[Path]:
    """Make a temporary folder beside `out`; remove it in the end unless it was published.

    >>> with staging_folder(Path("new-bundle"), print) as staging:
    ...     publish(staging, Path("new-bundle"), Kind("a bundle", "manifest.json"), force=False)

    Folders that a killed command left there are pointed out, not removed: they may belong to one that still runs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*-*")):
        say(f"note: {left} is of another command that writes {out.name}; if none is running, remove it")
    staging = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, out: Path, kind: Kind, *, force: bool) -> None:
    """Give the complete folder its name, which `check_folder` found.

    >>> publish(staging, Path("new-bundle"), Kind("a bundle", "manifest.json"), force=False)

    With `force`, a folder of that name is moved aside first, put back if anything fails, and removed last. Raises
    OutputError if `out` must not be replaced, OSError if the file system refuses.
    """
    storage.sync_tree(staging)
    check_folder(out, kind, force=force)
    if not os.path.lexists(out):
        storage.rename(staging, out)
        return
    new, aside = staging.stat(), Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(aside / out.name)
        staging.rename(out)
    except BaseException:  # Ctrl-C comes after either of them, too
        if _is_at(out, new):
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if os.path.lexists(aside / out.name):
            (aside / out.name).rename(out)  # if another folder took its name, the error says where this one is
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    storage.sync(out.parent)


def _is_at(path: Path, status: os.stat_result) -> bool:
    """True if `path` is the folder of this status; False if the file system cannot tell."""
    try:
        return os.path.samestat(path.lstat(), status)
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    """List what is in an input's folder: links lead from there to what is read too."""
    return list(folder.iterdir()) if folder.is_dir() else []
