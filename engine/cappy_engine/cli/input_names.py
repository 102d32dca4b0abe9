"""Tell what the names of inputs stand for: files, folders, patterns, or streams."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cappy_engine.bulk.folders import checked_files, files_of_folder
from cappy_engine.cli.streams import complain
from cappy_engine.errors import CappyError


def found_files(inputs: Sequence[str], outputs: Sequence[Path] = ()) -> list[tuple[Path, Path]]:
    """Find the files that the `inputs` mean, with their names in a folder of outputs.

    >>> found_files(["samples/part-0001.parquet"])
    [(PosixPath('samples/part-0001.parquet'), PosixPath('part-0001.parquet'))]
    """
    found: list[tuple[Path, Path]] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found += files_of_folder(path, outputs, say=complain)
        elif is_pattern(name):
            names = glob.iglob(name, recursive=True)  # noqa: PTH207 - a pattern may be absolute
            matches = checked_files(path for path in map(Path, names) if not path.is_dir())
            if not matches:
                raise CappyError(f"no file matches {name}")
            found += [(each, Path(each.name)) for each in matches]
        else:
            found.append((path, Path(path.name)))
    return found


def is_stream(name: str) -> bool:
    """True for stdin, pipes and devices, which are read once.

    >>> is_stream("-")
    True
    """
    if name == "-":
        return True
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(name).st_mode  # noqa: PTH116
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return False


def is_pattern(name: str) -> bool:
    """True for a pattern of names; a file that is there is meant by its name.

    >>> is_pattern("part-*.jsonl")
    True
    """
    return glob.has_magic(name) and not Path(name).exists()
