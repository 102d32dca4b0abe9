"""Where commands read and write. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from cappy_engine.bulk.jsonl import open_lines
from cappy_engine.checks import printable
from cappy_engine.storage import whole_file

QUIET, VERBOSE = "cappy.quiet", "cappy.verbose"
"""Where click's context keeps that --quiet and --verbose were given."""


@contextlib.contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz; `-` is stdin.

    >>> with open_input("pairs.jsonl.gz") as lines:
    ...     first = next(lines)

    Raises OSError, and CappyError for a damaged .gz.
    """
    if name == "-":
        yield sys.stdin.buffer
    else:
        with open_lines(name) as lines:
            yield lines


@contextlib.contextmanager
def open_output(path: Path | None, source: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Yield stdout, or a file that appears under its name only when everything was written.

    A pipe or a device is written to as it is. `source` is read meanwhile: it must not be our unfinished file.

        >>> with open_output(Path("scored.jsonl")) as output:
        ...     output.write(b"{}")

    Raises OSError.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the output must be a file, not a folder", str(path))
    path = path.resolve()
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    partial = path.with_name(path.name + ".partial")
    if source and partial.exists() and os.path.samestat(os.fstat(source.fileno()), partial.stat()):
        raise FileExistsError(errno.EEXIST, "the input has the name of our unfinished output; rename it", str(partial))
    is_open = False
    try:
        with whole_file(path, unfinished=partial) as file:
            is_open = True
            yield file
    except BaseException:
        if is_open:
            complain(f"what was written before this is in {partial}")
        raise


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """Leave by an exception at SIGTERM, so that unfinished files are removed.

    >>> with exit_on_termination():
    ...     export("my-checkpoint", "my-bundle")
    """
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_json(value: object) -> None:
    """Print a result as JSON, in UTF-8 whatever the terminal's encoding is.

    >>> print_json({"score": 0.5})
    """
    sys.stdout.buffer.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    """Print to stderr, unless the command was called with --quiet.

    >>> say("scoring 279 pairs")
    """
    if not is_quiet():
        complain(text)


def complain(text: str) -> None:
    """Print an error to stderr; what it quotes from files cannot steer the terminal.

    >>> complain("cappy score: no bundle at nowhere: it does not exist")
    """
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr, flush=True)


def is_quiet() -> bool:
    """Tell whether the command that runs was called with --quiet."""
    return _was_given(QUIET)


def is_verbose() -> bool:
    """Tell whether the command that runs was called with --verbose."""
    return _was_given(VERBOSE)


def _was_given(name: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(name))
