"""Keep TensorRT's engines between runs, in a private folder of this user.

    KEY/            mode 0700: what TensorRT wrote (engines, timing caches), and
      manifest.json what it was made from, and the size and sha256 of every file
    KEY.lock        held by whoever builds or opens that engine
    KEY.building-*  a build that goes on, or whose process died

ONNX Runtime writes these files while it opens a session, and takes what it finds again by file name, names in the graph
and versions, but not by weights: new weights under an old name would get the old engine, and wrong scores. Hence a
folder for each key, and a key of all that an engine depends on. An engine is native code: it is never taken from a
bundle nor from a folder that others can write, and not a byte of it is used that the manifest does not vouch for.
Knows nothing of ONNX Runtime or TensorRT; needs Linux.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from cappy_engine.bundle import MANIFEST, MAX_MANIFEST_BYTES
from cappy_engine.errors import DeviceUnavailable, reason_of
from cappy_engine.storage import cache_folder, locked, read_regular, sha256_of, sync, whole_file

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

Facts = Mapping[str, object]
"""All that an engine depends on, in values of JSON."""
T = TypeVar("T")


def engine_key(facts: Facts) -> str:
    """Name an engine by a digest of all that it depends on, 32 hexadecimal digits."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def engine_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Name the folder of the engines: `engines` in `storage.cache_folder`."""
    return cache_folder(environment).absolute() / "engines"


class EngineCache:
    """Keeps the engines below `root`. Any number of threads and processes may use one `root` at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, facts: Facts, make: Callable[[Path], T]) -> T:
        """Return what `make` returns for the folder of an engine with these `facts`: a checked one, or one to fill.

        `make` opens a session, and has written all its files when it returns; then they are kept with the `facts`. A
        new engine's folder is renamed after that. Whoever asks for the same one meanwhile waits; others do not. What
        `make` raises goes on, and a build that raised leaves nothing. Raises DeviceUnavailable if `root` cannot be
        written, or can be written by others.
        """
        key = engine_key(facts)
        with self._locked(key):
            with _translated(self.root):
                self._remove_leftovers(key)
                is_kept = self._is_usable(key, facts)
            return (self._reuse if is_kept else self._build)(key, facts, make)

    def _reuse(self, key: str, facts: Facts, make: Callable[[Path], T]) -> T:
        folder = self.root / key
        with _translated(self.root):
            before = _stamps(folder)
        try:
            made = make(folder)
        except Exception:
            # Kept all the same: an engine that was good is not at fault when the GPU has no memory left.
            log.warning("the engine in %s is as it was built, but did not open; remove it if this goes on", folder)
            raise
        with _translated(self.root):
            if changed := _unlike(before, _stamps(folder)):
                log.warning("TensorRT changed %s in %s; its manifest is written again", ", ".join(changed), folder)
                self._write_manifest(key, folder, facts)
        return made

    def _build(self, key: str, facts: Facts, make: Callable[[Path], T]) -> T:
        building = self.root / f"{key}.building-{os.getpid()}"
        with _translated(self.root):
            building.mkdir(mode=0o700)
        log.info("building an engine in %s", building)
        try:
            made = make(building)
            with _translated(self.root):
                self._keep(key, building, facts)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return made

    def _keep(self, key: str, building: Path, facts: Facts) -> None:
        if not _files(building):
            log.warning("TensorRT stored no engine for %s; the next start will build it again", key)
            _remove(building)
            return
        self._write_manifest(key, building, facts)
        building.rename(self.root / key)
        sync(self.root)

    def _write_manifest(self, key: str, folder: Path, facts: Facts) -> None:
        """Write the manifest last, when all that it vouches for is on the disk."""
        for name in _files(folder):
            sync(folder / name)
        document = _manifest_of(folder, facts)
        # Not begun in the folder, where it would be a file too many if the process died.
        with whole_file(folder / MANIFEST, meanwhile=self.root / f"{key}.building-manifest") as file:
            file.write(json.dumps(document, indent=2).encode())

    def _remove_leftovers(self, key: str) -> None:
        for path in self.root.iterdir():
            if path.name.startswith(f"{key}.building-"):  # whoever holds the lock builds; others are dead
                log.info("removing %s, whose process died", path)
                _remove(path)

    def _is_usable(self, key: str, facts: Facts) -> bool:
        """Say whether an engine is there to be used; an unusable one is removed."""
        folder = self.root / key
        try:
            _check_engine(folder, facts)
        except FileNotFoundError:
            return False
        except (ValueError, OSError) as error:
            log.warning("the engine in %s is not used but built again: %s", folder, error)
            _remove(folder)
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        lock = self.root / f"{key}.lock"
        with contextlib.ExitStack() as stack:
            with _translated(self.root):
                _make_private(self.root)
                try:
                    stack.enter_context(locked(lock, wait=False))
                except BlockingIOError:
                    log.info("waiting for the engine %s, which is being built or opened", key)
                    stack.enter_context(locked(lock, wait=True))
            yield


def _check_engine(folder: Path, facts: Facts) -> None:
    """Raise ValueError unless `folder` is private and holds the engine kept with these `facts`.

    Raises FileNotFoundError if there is no such folder.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError("it is not a folder")
    if status.st_uid != os.geteuid():
        raise ValueError(f"it belongs to user {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & 0o777 != 0o700:
        raise ValueError(f"its mode is {status.st_mode & 0o777:o} instead of 700")
    wanted = _manifest_of(folder, facts)  # before the manifest is read, which must be a regular file too
    try:
        found = json.loads(read_regular(folder / MANIFEST, limit=MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({reason_of(error)})") from error
    if found != wanted:
        raise ValueError(f"a file in it, or its {MANIFEST}, was changed, added or removed")


def _manifest_of(folder: Path, facts: Facts) -> dict[str, object]:
    """Describe the engine in `folder`, as it is kept: with the size and digest of every file."""
    files = {
        name: {"sha256": sha256_of(folder / name), "bytes": status.st_size} for name, status in _files(folder).items()
    }
    return {"schema_version": SCHEMA_VERSION, "facts": facts, "files": files}


def _files(folder: Path) -> dict[str, os.stat_result]:
    """List the files in `folder` but its manifest. Raises ValueError for a link, a folder or a special file."""
    found = {path.name: path.lstat() for path in sorted(folder.iterdir())}
    for name, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} in it is not a regular file")
    found.pop(MANIFEST, None)
    return found


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read what changes when a file is written; a digest would take a second for each GB."""
    return {
        name: (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for name, status in _files(folder).items()
    }


def _unlike(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _make_private(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise DeviceUnavailable(f"{root} is not a folder; remove it, or set CAPPY_CACHE to a folder of your own")
    if status.st_uid != os.geteuid():
        raise DeviceUnavailable(
            f"{root} belongs to user {status.st_uid}, and an engine is native code; "
            "set CAPPY_CACHE to a folder of your own"
        )
    if status.st_mode & 0o022:
        raise DeviceUnavailable(
            f"{root} can be written by others (mode {status.st_mode & 0o777:o}), and an engine is native code; "
            f"run 'chmod 700 {root}' if you trust what is in it, or set CAPPY_CACHE to a folder of your own"
        )


@contextlib.contextmanager
def _translated(root: Path) -> Iterator[None]:
    """Around all that the store does itself, and nothing that `make` does."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DeviceUnavailable(
            f"engines cannot be kept in {root} ({reason_of(error)}); mend it, or set CAPPY_CACHE to a folder of your "
            "own"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
