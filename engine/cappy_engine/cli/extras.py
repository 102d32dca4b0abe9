"""Turn a missing package into one clear error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cappy_engine.errors import InstallationError, install_hint


@contextlib.contextmanager
def extra(extras: str) -> Iterator[None]:
    """Turn a missing package into one clear error, which says how to install `extras`; also a decorator.

    >>> with extra("cpu,export"):
    ...     import torch

    Raises InstallationError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package.startswith("cappy_"):  # a mistake of ours
            raise
        raise InstallationError(f"this command needs the package {package!r}; {install_hint(extras)}") from error
