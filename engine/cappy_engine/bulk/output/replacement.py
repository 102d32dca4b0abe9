"""Replace a file, and keep its hard links, mounts, mode, owner and attributes.

A new file takes the old one's place if that keeps all of it; otherwise its content is written over the old one's. We
find out which, and whether it can be done, before we write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from cappy_engine import storage
from cappy_engine.errors import OutputError, reason_of


def prepare(descriptor: int, path: Path, status: os.stat_result | None) -> bool:
    """Make an open file beside `path` like the file that it is to replace.

    True if `path` must be written over instead. `status` is that of `path`, None if nothing is there.

        >>> prepare(partial.fileno(), Path("out.jsonl"), os.stat("out.jsonl"))
        False

    Raises OutputError if neither can be done.
    """
    can_rename = _can_rename(path.parent)
    if status is None:
        if can_rename is not None:
            raise OutputError(f"files cannot be renamed in {path.parent} ({can_rename}); choose another folder")
        return False
    is_written_over = (
        can_rename is not None
        or status.st_nlink > 1
        or storage.is_mounted(path)
        or _is_anothers(path, status)
        or not _make_like(descriptor, path, status)
    )
    try:
        os.close(os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)))
    except PermissionError as error:
        if is_written_over or error.errno == errno.EPERM:  # EPERM: nobody may change it
            raise OutputError(f"{path} can neither be replaced nor written ({reason_of(error)})") from error
    except OSError as error:
        if is_written_over:
            raise OutputError(f"{path} can neither be replaced nor written ({reason_of(error)})") from error
    return is_written_over


def replace(file: BinaryIO, partial: Path, path: Path, status: os.stat_result, *, is_written_over: bool) -> None:
    """Put the complete `file`, named `partial`, in the place of `path`, as `prepare` said.

        >>> replace(file, Path("out.jsonl.partial"), Path("out.jsonl"), status, is_written_over=False)

    Raises OSError, and OutputError if another file has come to `path`; `partial` is complete then.
    """
    if not is_written_over:
        try:
            partial.replace(path)
            storage.sync(path.parent)
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):  # mounted since
                raise
    flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    with storage.naming(path), os.fdopen(os.open(path, flags), "wb") as old:
        if not os.path.samestat(os.fstat(old.fileno()), status):
            raise OutputError(f"{path} was replaced meanwhile; move it away, and rename {partial}")
        size = file.seek(0, os.SEEK_END)
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(old.fileno(), 0, size)  # an error, before anything is lost, where there is no room
        file.seek(0)
        shutil.copyfileobj(file, old)
        old.truncate()
        old.flush()
        os.fsync(old.fileno())
    partial.unlink()


def _can_rename(folder: Path) -> str | None:
    """Try to rename a file in `folder`; returns the problem, None if there is none."""
    probe = folder / f".cappy-{secrets.token_hex(4)}"
    renamed = probe.with_name(f"{probe.name}-renamed")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600))
        probe.replace(renamed)
    except OSError as error:
        return reason_of(error)
    finally:
        for path in (probe, renamed):
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def _is_anothers(path: Path, status: os.stat_result) -> bool:
    """True where another user's file can be written, but not replaced, as in /tmp."""
    folder = path.parent.stat()
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, status.st_uid, folder.st_uid)


def _make_like(descriptor: int, path: Path, status: os.stat_result) -> bool:
    """Give an open file the owner, mode and attributes of `path`. False if that fails."""
    try:
        mine = os.fstat(descriptor)
        if (mine.st_uid, mine.st_gid) != (status.st_uid, status.st_gid):
            os.fchown(descriptor, status.st_uid, status.st_gid)
        if hasattr(os, "listxattr"):
            for name in os.listxattr(path):
                os.setxattr(descriptor, name, os.getxattr(path, name))
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
    except OSError as error:
        return error.errno in (errno.ENOTSUP, errno.ENOSYS)  # a file system without attributes
    return True
