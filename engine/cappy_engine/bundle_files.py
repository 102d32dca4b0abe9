"""Check a bundle's files against its manifest, and hold a model's files open.

They are open while the model is loaded and used. Only regular files are opened, and their size is checked before they
are read. Of a manifest it knows only the entries of files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from cappy_engine.errors import BundleError, ScoringError, reason_of
from cappy_engine.external_data import external_locations
from cappy_engine.storage import open_regular

EXTERNAL_SUFFIX = "_data"
"""A model's weights may lie in a file beside it, whose name is the model's and this."""
MAX_SMALL_BYTES = 256 * 2**20
"""The largest file but a model that is read; the largest known tokenizer.json has 35 MB."""


@dataclass(frozen=True)
class FileEntry:
    """The digest and the size that the manifest gives for one file."""

    sha256: str
    size_bytes: int


class ModelFiles:
    """The files of one model, held open: what is loaded is what was checked, and stays as it was.

    `path` is the graph. `is_mapped` says that its weights lie in a second file, which ONNX Runtime maps into memory:
    who writes over that file changes a model that runs.
    """

    def __init__(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        """Open the files that `entries` names, the graph first. Raises BundleError unless they have their sizes."""
        self._folder = folder
        self._entries = dict(entries)
        self._files: dict[str, BufferedReader] = {}
        weakref.finalize(self, _close, self._files).atexit = False  # a forked child's may be locked for ever
        for name, entry in entries.items():
            check_size(folder, name, entry)
            self._files[name] = _open(folder, name)
        self._stamps = {name: _stamp(file) for name, file in self._files.items()}
        self._graph = next(iter(entries))
        self.path = folder / self._graph
        self.is_mapped = len(entries) > 1

    def check(self) -> None:
        """Raise BundleError unless the files are the exported ones, byte by byte.

        Also raises BundleError if the model keeps weights in other files.
        """
        try:
            for name, file in self._files.items():
                file.seek(0)
                _check_digest(self._folder, name, self._entries[name], hashlib.file_digest(file, "sha256").hexdigest())
            others = external_locations(self._files[self._graph])
        except ValueError as error:
            raise BundleError(f"{self.path} is not an ONNX model ({error}); export the bundle again") from error
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read ({reason_of(error)})") from error
        others -= {Path(name).name.encode() for name in self._files if name != self._graph}
        if others:
            raise BundleError(
                f"{self.path} keeps weights in {sorted(map(os.fsdecode, others))}, which no digest covers; export the "
                "bundle again"
            )

    def check_loaded(self) -> None:
        """Raise BundleError if other files lie under these names now: one of them may have been loaded."""
        for name, file in self._files.items():
            try:
                is_same = os.path.samestat((self._folder / name).stat(), os.fstat(file.fileno()))
            except OSError:
                is_same = False
            if not is_same or _stamp(file) != self._stamps[name]:
                raise BundleError(f"{name} in bundle {self._folder} was changed while it was opened; open it again")

    def check_in_place(self) -> None:
        """Raise ScoringError if one of the files was written over since they were opened."""
        for name, file in self._files.items():
            if _stamp(file) != self._stamps[name]:
                raise ScoringError(
                    f"{self._folder / name} was written over while it was in use; open a new scorer, and give a new "
                    "bundle a folder of its own"
                )


MISSING = "it does not exist; name the folder of one, or make it with 'cappy export'"


def check_is_folder(folder: Path) -> None:
    """Raise BundleError unless there is a folder, which may be looked into."""
    try:
        problem = "" if folder.is_dir() else "not a folder" if folder.exists() else MISSING
    except OSError as error:  # the name is too long, or a folder above it is closed to this user
        problem = reason_of(error)
    if problem:
        raise BundleError(f"no bundle at {folder}: {problem}")


def check_size(folder: Path, name: str, entry: FileEntry) -> None:
    """Raise BundleError unless the file is there, a regular one, and has its size."""
    try:
        status = (folder / name).stat()
    except OSError as error:
        raise BundleError(f"bundle {folder} lacks {name} ({reason_of(error)}); export it again") from error
    except UnicodeEncodeError as error:
        raise BundleError(f"the manifest of bundle {folder} names a file outside of the bundle: {name!r}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{name} in bundle {folder} is not a regular file; export it again")
    size = status.st_size
    if size != entry.size_bytes:
        raise BundleError(f"{name} in bundle {folder} has {size} bytes instead of {entry.size_bytes}; export it again")


def check_nothing_else(folder: Path, parents: Iterable[str], names: Collection[str]) -> None:
    """Raise BundleError if the folders `parents` hold anything but the files `names`. The first such file ends it."""
    try:
        for found in (path for parent in parents for path in (folder / parent).rglob("*")):
            name = found.relative_to(folder).as_posix()
            if (found.is_symlink() or not found.is_dir()) and name not in names:
                raise BundleError(
                    f"bundle {folder} holds {name}, which its manifest does not name; remove it or export again"
                )
    except OSError as error:
        raise BundleError(f"the folders of bundle {folder} cannot be read ({reason_of(error)})") from error


def read_checked(folder: Path, name: str, entry: FileEntry) -> bytes:
    """Read a small file whole. Raises BundleError unless these bytes are what was exported."""
    check_size(folder, name, entry)
    if entry.size_bytes > MAX_SMALL_BYTES:
        raise BundleError(f"{name} in bundle {folder} has {entry.size_bytes} bytes; at most {MAX_SMALL_BYTES} are read")
    with _open(folder, name) as file:
        content = file.read(entry.size_bytes + 1)
    _check_digest(folder, name, entry, hashlib.sha256(content).hexdigest())
    return content


def _open(folder: Path, name: str) -> BufferedReader:
    try:
        return open_regular(folder / name)
    except OSError as error:
        raise BundleError(f"{name} in bundle {folder} cannot be read ({reason_of(error)})") from error


def _check_digest(folder: Path, name: str, entry: FileEntry, found: str) -> None:
    if found != entry.sha256:
        raise BundleError(
            f"{name} in bundle {folder} is not the file that was exported "
            f"(sha256 {found[:12]}..., expected {entry.sha256[:12]}...); export it again"
        )


def _stamp(file: BufferedReader) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _close(files: Mapping[str, BufferedReader]) -> None:
    for file in files.values():
        file.close()
