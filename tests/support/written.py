"""Write files with `open_output`, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.bulk.output.output_file import open_output

NEW, OLD = b"new\n", b"of an earlier run, and longer\n"


def write(
    path: Path,
    content: bytes = NEW,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    said: list[str] | None = None,
    **options: Any,
) -> list[str]:
    """Write a file, and do something `meanwhile`; returns what was said."""
    said = [] if said is None else said
    with open_output(path, say=said.append, **options) as output:
        output.write(content)
        meanwhile()
    return said


def interrupt() -> None:
    raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop(path: Path, **options: Any) -> None:
    """Begin to write a file, and be interrupted."""
    with pytest.raises(KeyboardInterrupt):
        write(path, OLD, meanwhile=interrupt, **options)
