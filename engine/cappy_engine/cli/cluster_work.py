"""Score or rank files for a command on a Ray cluster: check what was asked for, show progress, tell what was done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from cappy_engine.bulk.folders import Folder
from cappy_engine.bulk.ray.cluster import score_on_cluster
from cappy_engine.bulk.ray.pool import ClusterOptions
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import Task
from cappy_engine.cli import text
from cappy_engine.cli.arguments import EXIT_OK, EXIT_SKIPPED
from cappy_engine.cli.bulk_work import BulkOptions, leaving_out, totals_bar
from cappy_engine.cli.input_names import found_files, is_stream
from cappy_engine.cli.streams import STDOUT, say
from cappy_engine.options import ScorerOptions


def run_on_cluster(
    inputs: Sequence[str], bundle: Path, options: ScorerOptions, task: Task, rows: RowOptions, bulk: BulkOptions
) -> int:
    """Run a command's task for files on a cluster, and return the exit status.

        >>> run_on_cluster(["samples"], EMBEDDED, ScorerOptions(), ScoreTask(), RowOptions(), BulkOptions(ray="auto"))
        0

    Raises UsageError for options that do not go with a cluster.
    """
    if bulk.output is None or bulk.output == STDOUT:
        raise click.UsageError("--ray writes a folder; name it with -o")
    _check_options(inputs, options, rows, bulk)
    outputs = [bulk.output] if bulk.rejects is None else [bulk.output, bulk.rejects]
    folder = Folder(found_files(inputs, outputs), bulk.output, task, leaving_out(rows, bulk))
    started = time.monotonic()
    with totals_bar() as progress:
        totals = score_on_cluster(
            folder,
            bundle,
            options=options,
            cluster=ClusterOptions(bulk.ray or "auto"),
            rejected=bulk.rejects,
            resume=bulk.resume,
            say=say,
            progress=progress,
        )
    say(text.describe_totals(totals, time.monotonic() - started))
    return EXIT_SKIPPED if totals.refused else EXIT_OK


def _check_options(inputs: Sequence[str], options: ScorerOptions, rows: RowOptions, bulk: BulkOptions) -> None:
    """Raise UsageError for options that do not go with a cluster."""
    stream = next(filter(is_stream, inputs), None)
    if stream is not None:
        raise click.UsageError(f"--ray reads Parquet files, and {stream} is a stream; name files or folders")
    if bulk.force:
        raise click.UsageError("--ray writes a new folder; remove the one that is there, and leave out --force")
    if rows.on_error == "skip" and bulk.rejects is None:
        raise click.UsageError(
            "--ray leaves bad rows out only if they are listed; name a folder for them with --rejects"
        )
    if options.gpus is not None:
        raise click.UsageError("--ray gives each actor a GPU of its own; leave out --gpu")
