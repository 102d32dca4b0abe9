"""Write files whole or not at all, and lock files.

A locked file is for one process at a time. Files that grow line by line are in `bulk/resume/partial_file.py`. Knows
nothing of bundles, engines or rows.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast


class NamedFile(io.FileIO):
    """Write to a file or a descriptor, and name it in errors: the system does not say which file it refused.

    `written` counts the bytes.

    >>> NamedFile(1, "stdout", closefd=False).write(b"{}")
    2
    """

    def __init__(self, file: int | Path, name: str | Path, mode: str = "wb", *, closefd: bool = True) -> None:
        super().__init__(file, mode, closefd=closefd)
        self.called = str(name)
        self.written = 0

    def write(self, content: Any) -> int:
        """Write, and name the file in an error."""
        with naming(self.called):
            count = super().write(content)
        self.written += count or 0  # None: a pipe that does not block is full
        return count


@contextlib.contextmanager
def whole_file(path: Path, *, meanwhile: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write; it replaces `path` when the block ends without an error, and is then on the disk.

    Until then it has another name, `meanwhile` or one beside `path`, and it is removed if the block raises. Links are
    not followed: neither that name nor `path`, which is a name of our own making.

        >>> with whole_file(Path("answer.json")) as file:
        ...     file.write(b"{}")

    Raises OSError, which names `path` on a full disk.
    """
    partial = meanwhile or path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with io.BufferedWriter(NamedFile(partial, path, "xb")) as file:
        try:
            yield cast(BinaryIO, file)
            file.flush()
            with naming(path):
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    sync(path.parent)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` as indented JSON, whole or not at all. Raises OSError, and ValueError for NaN."""
    with whole_file(path) as file:
        file.write(json_bytes(document))


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Make indented JSON of `document`; lone surrogates are escaped. Raises ValueError for NaN.

    >>> json_bytes({"seed": 0}).decode()
    '{\\n  "seed": 0\\n}\\n'
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"  # which is JSON's escape, too


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read. Raises OSError, also for a pipe, device, socket or folder, and never waits for one.

    >>> with open_regular(Path("manifest.json")) as file:
    ...     begin = file.read(1)
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening some devices has effects
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises OSError for any other.

    >>> read_regular(Path("manifest.json"), limit=2**20)
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return content


def sha256_of(path: Path) -> str:
    """Compute the file's sha256, as 64 hexadecimal digits.

    >>> sha256_of(Path("cappy-bundle/config.json"))[:4]
    '9f2c'
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def append(file: BinaryIO, content: bytes) -> None:
    """Write `content` at the end of an open file, to the disk. Raises OSError."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def rename(path: Path, target: Path) -> None:
    """Give a file or folder its name; it keeps it after a power loss. Raises OSError."""
    path.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file in the OSErrors of its descriptor, which tell no name.

    >>> with naming("scored.jsonl.partial"):
    ...     os.fsync(file.fileno())
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync_tree(folder: Path) -> None:
    """Have a folder and all that is in it written to the disk. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, written to the disk. Raises OSError.

    Some file systems refuse it for folders, such as VirtualBox's shared ones: when names are written is left to them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file until its descriptor is closed or the process ends; False if another one holds the lock.

        >>> lock(file.fileno())
        True

    Raises OSError on a file system without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        from filelock import lock_descriptor

        return lock_descriptor(descriptor, blocking=False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of the file `path` while the block runs.

    The file is made (mode 0600) where it does not exist, and is never removed. Raises BlockingIOError if another
    process or thread holds it and `wait` is false, and OSError where the file cannot be locked.
    """
    from filelock import FileLock, Timeout  # imported here: scoring locks nothing, and starts sooner without it

    lock = FileLock(path, mode=0o600, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{path} is locked by another process") from error
    try:
        yield
    finally:
        lock.release()


def is_mounted(path: Path) -> bool:
    """Tell if a file or folder itself is a mount. Needs Linux.

    Files and folders that a container was given are mounts.
    """
    return hasattr(os, "O_PATH") and _mount_of(path) != _mount_of(path.parent)


def _mount_of(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_PATH)
        try:
            lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
        finally:
            os.close(descriptor)
        return next((line for line in lines if line.startswith("mnt_id:")), None)
    return None


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's measurements and engines are kept.

    CAPPY_CACHE, else `cappy-engine` in XDG_CACHE_HOME, else in `.cache` of HOME. Users without a HOME get a folder
    among the system's temporary files. Where nothing can be written, it is a folder that does not exist.
    """
    if environment.get("CAPPY_CACHE"):
        return Path(environment["CAPPY_CACHE"])
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"]) / "cappy-engine"
    return Path(environment.get("HOME") or _temporary_folder()) / ".cache" / "cappy-engine"


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # a container whose root is read-only: scoring needs no file
        return os.sep
