"""Say whether the native library was compiled with this package, and if not, why."""

from __future__ import annotations

from pathlib import Path

from cappy_engine.native.build import LIBRARY, SOURCES, digest, read_note


def why_no_library(folder: Path = SOURCES) -> str:
    """Say why `folder` has no library that can be used; "" if it has one built from these sources.

    >>> why_no_library()
    ''
    """
    note = read_note(folder)
    if note is None:
        return "they were never compiled; in a clone of cappy-engine, run: make native"
    if note.problem:
        return note.problem
    if not (folder / LIBRARY).is_file():
        return f"{folder / LIBRARY} is not there; install cappy-engine again"
    # A wheel brings no sources, so that none can change.
    if list(folder.glob("*.cpp")) and note.digest != digest(note.machine, folder):
        return "their sources changed since they were compiled; run: make native"
    return ""
