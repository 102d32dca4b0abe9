"""How a bundle appears: complete and under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cappy_engine.bundle import MANIFEST
from cappy_engine.errors import ExportError


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError if `target` must not be written: it exists, or with `force` it exists and is no bundle."""
    if os.path.lexists(target) and not force:
        raise ExportError(f"{target} exists; choose another name, or replace it with --force")
    if os.path.lexists(target) and not (target / MANIFEST).is_file():
        raise ExportError(f"{target} exists and is no bundle (it has no {MANIFEST}); --force replaces bundles only")


@contextlib.contextmanager
def staging_folder(target: Path, say: Callable[[str], object]) -> Iterator[Path]:
    """A temporary folder beside `target`, removed on the way out unless it was published.

    What a killed export left there is pointed out, not removed: it may belong to one that still runs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in sorted(target.parent.glob(f".{target.name}.*-*")):
        say(f"note: {left} is of another export to {target.name}; if none is running, remove it")
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, target: Path, *, force: bool) -> None:
    """Give the complete bundle its name.

    With `force`, what has the name is moved aside first, put back if anything fails, and removed last. Raises
    ExportError if `target` must not be replaced, OSError if the file system refuses.
    """
    for path in [*staging.rglob("*"), staging]:
        _sync(path)
    check_target(target, force=force)
    if not os.path.lexists(target):
        staging.rename(target)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(aside / target.name)
        try:
            staging.rename(target)
        except BaseException:
            (aside / target.name).rename(target)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
