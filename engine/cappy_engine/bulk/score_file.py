"""Score or rank the rows of a stream or of files, window by window.

Of files, a thread reads and tokenises the next window while one is scored, and another writes the one before it. So
five windows are in memory at most, however long a file is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cappy_engine.bulk.file_windows import FileWindows, most_pairs_of
from cappy_engine.bulk.formats.compression import packer, tables_for
from cappy_engine.bulk.formats.entries import Position, Reading, ScoredRow
from cappy_engine.bulk.formats.file_format import Format, format_of
from cappy_engine.bulk.formats.sources import LineSource, open_source
from cappy_engine.bulk.formats.writers import LineWriter, PackedWriter, needs_fields, writer_of
from cappy_engine.bulk.input_files import Files, State
from cappy_engine.bulk.resume.identity import inputs_of, scorer_settings, versions
from cappy_engine.bulk.resume.names import Names, find_names
from cappy_engine.bulk.resume.side_files import forget
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Run, Say, Target, finished, open_run
from cappy_engine.bulk.tasks import Task
from cappy_engine.bulk.totals import Progress, Totals
from cappy_engine.bulk.windows import Window, encode, windows
from cappy_engine.bulk.work import Work, rejects
from cappy_engine.errors import CappyError
from cappy_engine.overlap import Behind, ahead
from cappy_engine.scorer import Scorer

WINDOW_PAIRS = 128
"""Pairs of a stream that are read before they are scored: enough to give every core full batches, and few enough that
results of the full-size model on two cores come every minute."""

log = logging.getLogger(__name__)


def process_lines(
    scorer: Scorer,
    lines: Iterable[bytes],
    write: Callable[[bytes], object],
    task: Task,
    options: RowOptions,
    *,
    progress: Progress = lambda totals: None,
    reject: Callable[[bytes], object] | None = None,
) -> Totals:
    """Score or rank the rows of a stream of JSON Lines, in the same order.

        >>> process_lines(scorer, sys.stdin.buffer, sys.stdout.buffer.write, RankTask(), RowOptions()).pairs
        14

    `lines` is an open file, or any iterable. A row keeps its bytes: the task's fields are put before its last brace.
    `write` gets many rows at once: whenever enough were read, and whenever a pipe, a terminal or a socket pauses.

    A bad line raises InvalidLine after the rows before it were written, or with `on_error="skip"` is left out, and
    listed in `Totals.skipped`; `reject` gets a line for it, and without that it is logged. Bad is a line that
    `json_lines.read_row` refuses, one longer than `max_line_bytes`, one that has a field of the task already, and one
    whose pair cannot be scored; with `too_long="refuse"` also one whose pair would be truncated. `progress` is called
    after every batch.
    """
    source = LineSource(lines, Reading(task, options.max_line_bytes))
    work = Work(scorer, options, progress, Totals(), has_rejects=reject is not None)
    writer = LineWriter(task, keeps_bytes=True)
    for window in windows(source, Position(), most_pairs=options.window or WINDOW_PAIRS, stops=options.stops):
        ended = dataclasses.replace(window, bytes_done=window.end.done)
        encoded = encode(scorer, ended, too_long=options.too_long, stops=options.stops)
        _write_scored(work, encoded, writer, write, reject)
    return work.totals


def score_file(
    scorer: Scorer,
    files: Files,
    target: Target,
    *,
    say: Say = log.warning,
    progress: Progress = lambda totals: None,
) -> Totals:
    """Score or rank rows of files into one file, which appears when complete.

        >>> score_file(scorer, Files([Path("pairs.jsonl")], ScoreTask()), Target(Path("scored.parquet"))).pairs
        7

    Formats are told by the names. A run that was stopped goes on with `Target.resume`, and writes the same bytes as one
    that was not. Raises InvalidLine at a bad row (`on_error="stop"`), CappyError, OutputError and OSError.
    """
    form = format_of(target.out)
    target = dataclasses.replace(target, out=find_names(target.out, force=True).target)  # links are followed once
    states = files.states()  # first: what changes behind it is noticed
    settings = settings_of(scorer, files, form)
    marked = finished(target, settings) if target.resume else {}
    if marked:
        say(f"{target.out} is complete already")
        return _end(target, Totals.going_on(marked["totals"]), settings)
    reader, writer = _prepare(scorer, files, states, form, target.out)
    target = dataclasses.replace(target, inputs=[*target.inputs, *files.paths])
    make = tables_for(target.out).write_parquet_of if form.kind == "parquet" else None
    with open_run(target, settings, {"versions": versions(scorer)}, say, make) as run:
        totals = Totals.going_on(run.marked.get("totals", {}))
        totals.bytes_total = files.size()
        work = Work(scorer, files.options, progress, totals, has_rejects=target.rejects is not None)
        if not run.is_made:
            _run(work, reader, run, writer)
        run.finish()
        return _end(target, totals, settings)


def score_to(
    scorer: Scorer,
    files: Files,
    write: Callable[[bytes], object],
    *,
    name: Path | None = None,
    progress: Progress = lambda totals: None,
    reject: Callable[[bytes], object] | None = None,
) -> Totals:
    """Score or rank rows of files into a stream, unpacked.

        >>> score_to(scorer, Files([Path("pairs.csv")], ScoreTask()), sys.stdout.buffer.write).pairs
        7

    Its format is that of its `name`, else that of the files. No run can go on with it. `reject` is that of
    `process_lines`. Raises what `score_file` raises.
    """
    form = dataclasses.replace(format_of(name) if name else files.format, packing="")
    if form.kind == "parquet":
        raise CappyError("Parquet is not written to a stream; name a file with -o, as in -o scored.parquet")
    reader, writer = _prepare(scorer, files, files.states(), form, name or Path("-"))
    totals = Totals(bytes_total=files.size())
    work = Work(scorer, files.options, progress, totals, has_rejects=reject is not None)
    begun = writer.begin()
    if begun:
        write(begun)
    with ahead(reader.since(Position())) as ready:
        for window in ready:
            _write_scored(work, window, writer, write, reject)
    return work.totals


def settings_of(scorer: Scorer, files: Files, form: Format) -> dict[str, Any]:
    """Say what decides the bytes of the output. What happens at a bad row may change: none was written.

    >>> settings_of(scorer, Files([Path("pairs.jsonl")], ScoreTask()), Format("jsonl"))["task"]
    'ScoreTask'
    """
    return {
        "task": type(files.task).__name__,
        **dataclasses.asdict(files.task),  # type: ignore[call-overload]  # all tasks are
        "input": inputs_of(files.paths),
        "output": str(form) + (f" {form.packing}" if form.packing else ""),
        "too_long": files.options.too_long,
        "max_line_bytes": files.options.max_line_bytes,
        "max_text_chars": scorer.tokenizer.max_text_chars,
        "window": most_pairs_of(scorer, files.options),
        "scorer": scorer_settings(scorer),
    }


def _end(target: Target, totals: Totals, settings: Mapping[str, Any]) -> Totals:
    target.done(totals, settings)
    forget(Names(target.out))
    return totals


def _write_scored(
    work: Work,
    window: Window,
    writer: LineWriter | PackedWriter,
    write: Callable[[bytes], object],
    reject: Callable[[bytes], object] | None,
) -> None:
    """Score a window that was tokenised, and write it to a stream. Raises what ended the input behind it."""
    scored, rows = work.score(window)
    if rows:
        write(writer.rows(rows))
    if reject is not None and scored.refused:
        reject(rejects(scored))
    work.check(scored)


def _prepare(
    scorer: Scorer, files: Files, states: Sequence[State], form: Format, name: Path
) -> tuple[FileWindows, PackedWriter]:
    """Choose how rows are read and written: the first file tells the columns, and all others must have them.

    That is checked here, before anything is scored; only pipes are left to their turn.
    """
    reading = Reading(files.task, files.options.max_line_bytes, needs_fields(form, files.format))
    with open_source(files.paths[0], reading) as first:
        header, columns = first.header, first.columns
    for path, state in zip(files.paths[1:], states[1:], strict=True):
        if state:
            with open_source(path, reading) as source:
                files.check_columns(path, source.columns, columns)
    rows = writer_of(form, files.format, files.task, header)
    reader = FileWindows(scorer, files, reading, columns, most_pairs_of(scorer, files.options), rows, states)
    return reader, PackedWriter(rows, packer(form.packing, name))


def _run(work: Work, reader: FileWindows, run: Run, writer: PackedWriter) -> None:
    """Score what is left of the files, window by window."""
    start = Position(**run.marked.get("position", {}))
    if not run.marked:
        run.commit(writer.begin(), b"", {"position": dataclasses.asdict(start), "totals": work.totals.marked()})
    else:
        writer.go_on(run.growing.file, run.size)

    def write(done: tuple[Window, list[ScoredRow], Mapping[str, int]]) -> None:
        window, rows, totals = done
        if window.error is not None:  # the window is not whole, and is scored again by a run that goes on
            run.write(writer.rows(rows) if rows else b"")
            return
        position = {"position": dataclasses.asdict(window.end), "totals": totals}
        run.commit(writer.rows(rows), rejects(window), position)

    with ahead(reader.since(start)) as ready, Behind(write) as later:
        for window in ready:
            scored, rows = work.score(window)
            later((scored, rows, work.totals.marked()))
            work.check(scored)
