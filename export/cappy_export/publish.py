"""Give a finished folder its name: complete, or not at all. Knows bundles only by their manifest."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cappy_engine import storage
from cappy_engine.bundle import MANIFEST
from cappy_engine.errors import ExportError
from cappy_export.options import Say


def check_out(out: Path, *, force: bool) -> None:
    """Raise ExportError if `out` must not be written: it exists, or with `force` it exists and is not a bundle.

    >>> check_out(Path("new-bundle"), force=False)
    """
    if os.path.lexists(out) and not force:
        raise ExportError(f"{out} exists; choose another name, or replace it with --force")
    if os.path.lexists(out) and not (out / MANIFEST).is_file():
        raise ExportError(f"{out} exists and is not a bundle (it has no {MANIFEST}); --force replaces bundles only")


@contextlib.contextmanager
def staging_folder(out: Path, say: Say) -> Iterator[Path]:
    """Make a temporary folder beside `out`; remove it in the end unless it was published.

    >>> with staging_folder(Path("new-bundle"), print) as staging:
    ...     publish(staging, Path("new-bundle"), force=False)

    Folders that a killed export left there are pointed out, not removed: they may belong to one that still runs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(out.parent.glob(f".{out.name}.*-*")):
        say(f"note: {left} is of another export to {out.name}; if none is running, remove it")
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, out: Path, *, force: bool) -> None:
    """Give the complete folder its name.

    >>> publish(staging, Path("new-bundle"), force=False)

    With `force`, a bundle of that name is moved aside first, put back if anything fails, and removed last. Raises
    ExportError if `out` must not be replaced, OSError if the file system refuses.
    """
    storage.sync_tree(staging)
    check_out(out, force=force)
    if not os.path.lexists(out):
        storage.rename(staging, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(aside / out.name)
    try:
        staging.rename(out)
    except BaseException:
        (aside / out.name).rename(out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    storage.sync(out.parent)
