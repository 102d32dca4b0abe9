"""What the commands share: how one is added, what its arguments may be, where it reads and what it says."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.jsonl import open_lines
from cappy_engine.errors import InstallationError

EXIT_OK, EXIT_ERROR, EXIT_SKIPPED = 0, 1, 3


def add_command(commands: Any, name: str, run: Any, text: str, examples: str) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options and returns the exit status; `text` says what it does.

    `run` is None for a command whose own commands do the work. --verbose has no default here: a command of a command
    would reset what was said before it.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="say more on stderr")
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """The type of an argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seconds_above_0(text: str) -> float:
    """The type of an argument in seconds, above 0 and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def fraction(text: str) -> float:
    """The type of an argument of 0 or more and less than 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and less than 1, got {value}")
    return value


@contextlib.contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz; `-` is stdin."""
    if name == "-":
        yield sys.stdin.buffer
    else:
        with open_lines(name) as lines:
            yield lines


@contextlib.contextmanager
def open_output(path: Path | None, source: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Yield stdout, or a file that appears under its name only when everything was written.

    What is there and no regular file (a pipe, a device) is written to as it is. `source` is what is read meanwhile: it
    must not be our unfinished file.
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
    file = partial.open("wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        say(f"what was written before this is in {partial}")
        raise
    partial.replace(path)


@contextlib.contextmanager
def exit_on_termination() -> Iterator[None]:
    """Leave by an exception at SIGTERM, so that unfinished files are removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def import_export(module: str = "cappy_export.pipeline", extras: str = "cpu,export") -> Any:
    """Import a module of cappy_export, whose packages are not installed in production."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"this command needs the package {error.name!r}; run: pip install 'cappy-engine[{extras}]'"
        ) from error


def import_training(module: str) -> Any:
    """Import a module of cappy_export that needs the extra `train`."""
    return import_export(module, "cpu,export,train")


def print_json(value: object) -> None:
    """Print a result; JSON is UTF-8 whatever the terminal's encoding is."""
    sys.stdout.buffer.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    """Tell people something that is no result."""
    print(text, file=sys.stderr, flush=True)
