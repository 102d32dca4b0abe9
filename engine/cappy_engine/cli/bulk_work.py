"""Score or rank files for a command: find inputs and outputs, show progress, tell what was done."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import click

from cappy_engine.bulk.folders import Folder, score_folder
from cappy_engine.bulk.formats.file_format import check_name, format_of
from cappy_engine.bulk.input_files import Files
from cappy_engine.bulk.output.places import Input, Place, check_output, files_in
from cappy_engine.bulk.ray.pool import check_address
from cappy_engine.bulk.resume.names import check_rejects
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.score_file import process_lines, score_file, score_to
from cappy_engine.bulk.tasks import Task
from cappy_engine.bulk.totals import Totals
from cappy_engine.bundle import MANIFEST
from cappy_engine.cli import text
from cappy_engine.cli.arguments import EXIT_OK, EXIT_SKIPPED, flags_given
from cappy_engine.cli.input_names import found_files, is_pattern, is_stream
from cappy_engine.cli.progress import progress_bar
from cappy_engine.cli.standard import is_closed
from cappy_engine.cli.streams import STDOUT, complain, open_input, open_output, say
from cappy_engine.cli.values import is_named_as_folder
from cappy_engine.errors import CappyError, OutputError
from cappy_engine.options import Asked, check_asked
from cappy_engine.scorer import Scorer


@dataclass(frozen=True)
class BulkOptions:
    """What a command writes, and how it goes on.

    >>> BulkOptions(output=Path("scored.jsonl")).resume
    False

    Raises ValueError.
    """

    output: Annotated[
        Path | None,
        Asked(
            "file or folder to write; the format is told by the name (default: stdout)",
            flag="-o --output",
            metavar="OUT",
        ),
    ] = None
    force: Annotated[bool, Asked("replace OUT if it exists")] = False
    resume: Annotated[bool, Asked("go on with a run that was stopped; begin where there is none")] = False
    rejects: Annotated[
        Path | None, Asked("leave bad rows out, and write them to this file with the reason", metavar="FILE")
    ] = None
    ray: Annotated[
        str | None,
        Asked(
            "score Parquet files into the folder OUT on a Ray cluster: HOST:PORT of its head, 'local' for this "
            "machine alone (without a value: the cluster of this machine)",
            metavar="[ADDRESS]",
            alone="auto",
            check=check_address,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_asked(self)
        if self.resume and self.output in (None, STDOUT):
            raise ValueError("--resume needs a file to go on with; name one with -o")
        if self.rejects == STDOUT:
            raise ValueError("--rejects needs a file, and - is none: stdout is for results; name a file")
        if self.rejects is not None and self.rejects == self.output and not self.rejects.is_char_device():
            raise ValueError(f"--rejects and -o are both {self.rejects}; choose another name")


def run_bulk(
    inputs: Sequence[str], bundle: Path, task: Task, rows: RowOptions, bulk: BulkOptions,
    open_scorer: Callable[[], Scorer],
) -> int:  # fmt: skip
    """Run a command's task for files or stdin, and return the exit status.

    >>> run_bulk(["pairs.jsonl"], EMBEDDED, ScoreTask(), RowOptions(), BulkOptions(), Scorer.open)
    0
    """
    if bulk.force and bulk.output is None and bulk.rejects is None:
        raise click.UsageError("--force replaces OUT; name it with -o")
    rows = leaving_out(rows, bulk)
    started = [0.0]

    @contextlib.contextmanager
    def opened() -> Iterator[tuple[Scorer, Callable[[Totals], None]]]:
        with open_scorer() as scorer, totals_bar() as progress:
            started[0] = time.monotonic()
            yield scorer, progress

    kept = files_in(bundle, MANIFEST)
    has_folder, is_one = any(Path(name).is_dir() for name in inputs), len(inputs) == 1 and not is_pattern(inputs[0])
    if not has_folder:
        _check_folders(bulk, is_one=is_one)
    streams = [name for name in inputs if is_stream(name)]
    if streams and len(inputs) > 1:
        raise click.UsageError(f"{streams[0]} is a stream, and is read alone; give one input")
    if streams:
        totals = _from_stream(inputs[0], task, rows, bulk, kept, opened)
    elif has_folder or _is_folder(bulk.output, is_one=is_one):
        outputs = [path for path in (bulk.output, bulk.rejects) if path not in (None, STDOUT)]
        folder = Folder(found_files(inputs, outputs), _required(bulk.output), task, rows)
        with opened() as (scorer, progress):
            totals = score_folder(scorer, folder, _target(bulk, kept), say=complain, progress=progress)
    else:
        totals = _from_files([path for path, _ in found_files(inputs)], task, rows, bulk, kept, opened)
    say(text.describe_totals(totals, time.monotonic() - started[0]))
    return EXIT_SKIPPED if totals.refused else EXIT_OK


def leaving_out(rows: RowOptions, bulk: BulkOptions) -> RowOptions:
    """Have bad rows left out, where they are written to a file or folder. Raises UsageError for --on-error stop.

    >>> leaving_out(RowOptions(), BulkOptions(rejects=Path("bad.jsonl"))).on_error
    'skip'
    """
    if bulk.rejects is None:
        return rows
    if rows.on_error == "stop" and flags_given(["on_error"]):
        raise click.UsageError("--rejects leaves bad rows out; give it without --on-error stop")
    return dataclasses.replace(rows, on_error="skip")


Opened = Callable[[], contextlib.AbstractContextManager[tuple[Scorer, Callable[[Totals], None]]]]


def _from_stream(
    name: str, task: Task, rows: RowOptions, bulk: BulkOptions, kept: Sequence[Path], opened: Opened
) -> Totals:
    if bulk.resume:
        raise click.UsageError(f"--resume needs a file to read again, and {name} is a stream")
    if bulk.output is not None and format_of(bulk.output).kind != "jsonl":
        raise CappyError(f"a stream is JSON Lines, and {bulk.output} is not; choose a .jsonl output")
    with open_input(name) as lines, _outputs(bulk, [lines, *kept]) as (write, reject), opened() as (scorer, progress):
        return process_lines(scorer, lines, write, task, rows, progress=progress, reject=reject)


def _from_files(
    paths: Sequence[Path], task: Task, rows: RowOptions, bulk: BulkOptions, kept: Sequence[Path], opened: Opened
) -> Totals:
    out = bulk.output
    for path in [*paths, *([] if out is None else [out])]:
        check_name(path)  # an error, before the model is opened
    for path in paths:
        path.open("rb").close()  # likewise
    files = Files(paths, task, rows)
    if out is not None and out != STDOUT and not check_output(out, force=True, inputs=[*paths, *kept]).is_stream:
        if not bulk.resume:
            check_output(out, force=bulk.force, inputs=[*paths, *kept])
        _check_places(bulk)
        with opened() as (scorer, progress):
            return score_file(scorer, files, _target(bulk, kept), say=complain, progress=progress)
    if bulk.resume:
        raise click.UsageError(f"--resume needs a file to go on with, and {out} is a stream")
    name = None if out is None or out == STDOUT else out
    with _outputs(bulk, [*paths, *kept]) as (write, reject), opened() as (scorer, progress):
        return score_to(scorer, files, write, name=name, progress=progress, reject=reject)


@contextlib.contextmanager
def _outputs(
    bulk: BulkOptions, inputs: Sequence[Input]
) -> Iterator[tuple[Callable[[bytes], None], Callable[[bytes], None] | None]]:
    """Open what a stream of rows, and one of rejects, is written to."""
    _check_places(bulk)
    with contextlib.ExitStack() as stack:
        reject = None
        if bulk.rejects is not None:  # first, so that results get their name before: without them, bad rows tell little
            reject = _flushing(stack.enter_context(open_output(bulk.rejects, force=bulk.force, inputs=inputs)))
        yield _flushing(stack.enter_context(open_output(bulk.output, force=bulk.force, inputs=inputs))), reject


def _check_places(bulk: BulkOptions) -> None:
    """Raise OutputError if a folder is missing, or results and bad rows share a file.

    There bad rows would be mixed into the results, or written over them.
    """
    for path in (bulk.output, bulk.rejects):
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: the folder {path.parent} does not exist; make it first")
    if bulk.rejects is None:
        return
    if bulk.output not in (None, STDOUT):
        check_rejects(bulk.rejects, bulk.output)
    elif not is_closed(1):
        check_rejects(bulk.rejects, Place(STDOUT, os.fstat(1), 1))


def _flushing(file: BinaryIO) -> Callable[[bytes], None]:
    def write(rows: bytes) -> None:
        file.write(rows)
        file.flush()

    return write


def _target(bulk: BulkOptions, kept: Sequence[Path]) -> Target:
    return Target(_required(bulk.output), bulk.rejects, bulk.resume, bulk.force, kept)


def _required(output: Path | None) -> Path:
    if output is None or output == STDOUT:
        raise click.UsageError("several files are written to a folder; name it with -o")
    return output


def _check_folders(bulk: BulkOptions, *, is_one: bool) -> None:
    """Raise OutputError if a name with a final / would become a file's name."""
    for path, option, may_be_folder, example in (
        (bulk.output, "-o", not is_one, "scored.jsonl"),
        (bulk.rejects, "--rejects", _is_folder(bulk.output, is_one=is_one), "bad.jsonl"),
    ):
        if path is None or not is_named_as_folder(path):
            continue
        if not may_be_folder:
            advice = f"name that, as in {option} {path / example}"
            raise OutputError(f"{path}/ is a folder's name, and all is written to one file; {advice}")
        if not path.is_dir():
            raise OutputError(f"{path}/ is not a folder; make it first, or leave out the / at its end")


def _is_folder(output: Path | None, *, is_one: bool) -> bool:
    """True if each input goes to its own name in a folder that is there. A single one goes to a file."""
    return output is not None and not is_one and output.is_dir()


@contextlib.contextmanager
def totals_bar() -> Iterator[Callable[[Totals], None]]:
    """Yield a function that shows pairs/s, tokens/s, truncated pairs, bad rows and the time left.

    >>> with totals_bar() as progress:
    ...     progress(Totals(pairs=7))
    """
    started = time.monotonic()
    shows: list[Callable[[Totals], None]] = []
    with contextlib.ExitStack() as stack:

        def first(totals: Totals) -> None:
            layout = "{percentage:3.0f}%|{bar}| {postfix}, {remaining} left"
            show = stack.enter_context(progress_bar(layout=layout if totals.bytes_total else "{postfix} in {elapsed}"))
            begun = totals.bytes_begun

            def show_totals(totals: Totals) -> None:
                facts = [f"{totals.pairs} pairs", text.describe_rate(totals, time.monotonic() - started)]
                facts += [f"{totals.truncated} truncated"] if totals.truncated else []
                facts += [f"{totals.refused} bad"] if totals.refused else []
                show(totals.bytes_scored, totals.bytes_total, ", ".join(facts), begun=begun)

            shows.append(show_totals)

        def progress(totals: Totals) -> None:
            if not shows:
                first(totals)
            shows[0](totals)

        yield progress
