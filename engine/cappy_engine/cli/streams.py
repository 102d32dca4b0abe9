"""Where commands read and write. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import click

from cappy_engine.bulk.formats.json_lines import open_lines
from cappy_engine.bulk.output.output_file import open_output as open_file
from cappy_engine.bulk.output.places import Input, check_not_read, check_output
from cappy_engine.checks import printable
from cappy_engine.cli.standard import is_closed, silence
from cappy_engine.errors import CappyError, OutputError

QUIET, VERBOSE, WORDS = "cappy.quiet", "cappy.verbose", "cappy.words"
"""Where click's context keeps that --quiet and --verbose were given, and the words behind a command's name."""
STDOUT = Path("-")


@contextlib.contextmanager
def open_input(name: str) -> Iterator[BinaryIO]:
    """Yield the file's bytes, unpacked where its name ends in .gz; `-` is stdin.

    >>> with open_input("pairs.jsonl.gz") as lines:
    ...     first = next(lines)

    Raises OSError, and CappyError for a damaged .gz and a closed stdin.
    """
    if name == "-":
        yield open_stdin()
    else:
        with open_lines(name) as lines:
            yield lines


def open_stdin() -> BinaryIO:
    """Give stdin's bytes. Raises CappyError if the command was started without one.

    >>> open_stdin().read()
    """
    if is_closed(0):
        raise CappyError("stdin is closed, so there is nothing to read from it; name a file")
    return sys.stdin.buffer


@contextlib.contextmanager
def open_output(path: Path | None, *, force: bool = False, inputs: Sequence[Input] = ()) -> Iterator[BinaryIO]:
    """Yield stdout (None or `-`), or a file to write.

    The file appears under its name only when everything was written. An existing file is replaced with `force` only,
    and none of the `inputs` ever is.

        >>> with open_output(Path("scored.jsonl")) as output:
        ...     output.write(b"{}")

    Raises OutputError and OSError.
    """
    if path is not None and path != STDOUT:
        number = check_output(path, force=force, inputs=inputs).descriptor
        if number is not None and number < 3 and is_closed(number):
            raise OutputError(f"{path} cannot be written: it was closed when the command was started")
        with open_file(path, force=force, inputs=inputs, say=complain) as output:
            yield output
        return
    if is_closed(1):
        raise OutputError("stdout is closed, so the results cannot be written; name a file with -o")
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file of the system
        check_not_read("file", os.fstat(sys.stdout.fileno()), inputs, "is stdout too; name another one with -o")
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print a result as JSON, in UTF-8 whatever the terminal's encoding is; without `indent` it is one line.

    Lone surrogates, which UTF-8 does not have, are escaped.

        >>> print_json({"score": 0.5})
    """
    sys.stdout.flush()
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    sys.stdout.buffer.write(text.encode(errors="backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def show(text: str) -> None:
    """Print a table or another result for people to stdout; what it quotes from files cannot steer the terminal.

    >>> show("rank   score  index  response")
    """
    print(_clean(text), flush=True)


def tell(text: str) -> None:
    """Print to stdout what was written to files: a closed stdout is not an error then.

    >>> tell("wrote cappy-bundle")
    """
    if not is_closed(1):
        show(text)


def say(text: str) -> None:
    """Print to stderr, unless the command was called with --quiet.

    >>> say("scoring 279 pairs")
    """
    if not is_quiet():
        complain(text)


def complain(text: str) -> None:
    """Print an error to stderr; what it quotes from files cannot steer the terminal. Nobody is told if that fails.

    >>> complain("cappy score: no bundle at nowhere: it does not exist")
    """
    try:
        print(_clean(text), file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


class CleanFormatter(logging.Formatter):
    """Formats what is logged for a terminal, which it cannot steer."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record as its lines, with dots for what is not printable."""
        return _clean(super().format(record))


def is_quiet() -> bool:
    """Tell whether the command that runs was called with --quiet."""
    return _was_given(QUIET)


def is_verbose() -> bool:
    """Tell whether the command that runs was called with --verbose."""
    return _was_given(VERBOSE)


def _clean(text: str) -> str:
    """Put dots for what is not printable, but keep our own line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def _was_given(name: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(name))


def words_given() -> tuple[str, ...]:
    """Give the words behind the name of the command that runs, as they were given.

    >>> words_given()
    ('my-checkpoint', 'train.jsonl', 'my-cappy', '--epochs', '3')
    """
    found: tuple[str, ...] = click.get_current_context().meta[WORDS]
    return found
