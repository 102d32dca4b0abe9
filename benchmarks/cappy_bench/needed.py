"""Names the package that a program of the benchmarks lacks, and how to install it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from cappy_engine.cli.extras import extra
from cappy_engine.errors import InstallationError


@contextlib.contextmanager
def needed(extras: str, importer: str) -> Iterator[None]:
    """Turn a missing package into one line, as `cappy` does.

    >>> with needed("bench", __name__):
    ...     import onnx

    Raises SystemExit with this line if `importer` is the program that was started. Raises InstallationError if
    `importer` is another module.
    """
    try:
        with extra(extras):
            yield
    except InstallationError as error:
        if importer != "__main__":
            raise
        sys.exit(f"error: {error}")
