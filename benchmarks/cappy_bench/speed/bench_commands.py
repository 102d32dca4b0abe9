"""`cappy bench`: how fast and how exact Cappy is on this machine, alone or beside other tools."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import click

from cappy_bench.bulk.bulk_options import BulkBenchOptions
from cappy_bench.load.load_options import LoadOptions
from cappy_bench.load.load_tables import load_tables
from cappy_bench.peers.specs import SPECS
from cappy_bench.speed.figures import read_result, taken_from
from cappy_bench.speed.run_options import RESULTS, RunOptions
from cappy_bench.speed.tables import change_tables, result_tables, setting_table
from cappy_engine.cli.arguments import command, flags_given, force_option, group, quiet_option, takes
from cappy_engine.cli.extras import extra
from cappy_engine.cli.streams import print_json, say, show
from cappy_engine.cli.values import PATH
from cappy_engine.options import ScorerOptions

SERVED = ("precision", "threads", "mode", "max_batch_tokens")
"""Options of the server or the command that is started."""


@group(
    """
    examples:
      cappy bench run
      cappy bench run --bundle cappy-bundle --checkpoint my-checkpoint --out result.json
      cappy bench compare before.json after.json
      cappy bench report
      cappy bench serve --bundle cappy-bundle
      cappy bench bulk --pairs 1000000
      cappy bench curve my-cappy curve.svg

    numbers are useful tokens: padding counts for nothing
    """
)
def bench() -> None:
    """Measure throughput and latency, alone or beside other tools."""


@command(
    """
    examples:
      cappy bench run
      cappy bench run --suite full --bundle cappy-bundle --pairs pairs.jsonl
      cappy bench run --bundle cappy-bundle --checkpoint my-checkpoint --out result.json

    The last line on stdout is the result as one JSON document. A run that was stopped goes on from its notes in --work.
    """,
    of=bench,
)
@takes(RunOptions)
@quiet_option
def run(options: RunOptions) -> None:
    """Measure a bundle; with its checkpoint, measure other tools and parity too.

    Without --checkpoint only Cappy is measured, in the precisions of the bundle. A tool that is not installed is named
    in the result, with the reason.
    """
    with extra("bench"):
        from cappy_bench.speed.measure import measure
    result = measure(options, say=_say)
    show(result_tables(result))
    print_json(result, indent=None)


@command(
    """
    examples:
      cappy bench compare result.json
      cappy bench compare before.json after.json
    """,
    of=bench,
)
@click.argument("results", type=PATH, nargs=-1, required=True, metavar="RESULT [RESULT]")
def compare(results: Sequence[Path]) -> None:
    """Print a result, or what changed between two."""
    if len(results) > 2:
        raise click.UsageError("compare takes one result, or two")
    found, tables = [read_result(path) for path in results], []
    for path, result in zip(results, found, strict=True):
        with taken_from(path):  # beside itself, so that an error has the right name
            tables.append(result_tables(result))
            change_tables(result, result, names=("", ""))
    if len(found) == 1:
        show(tables[0])
    else:
        before, after = (path.name for path in results)
        names = (before, after) if before != after else (str(results[0]), str(results[1]))
        show(change_tables(found[0], found[1], names=names))


@command(
    """
    examples:
      cappy bench report
      cappy bench report --results my-results --force
    """,
    of=bench,
)
@click.option(
    "--results",
    type=PATH,
    default=RESULTS,
    show_default=True,
    metavar="FOLDER",
    help="folder of the JSON files, where the page goes too",
)
@click.option("--force", is_flag=True, help="replace the page and its plots if they exist")
def report(results: Path, force: bool) -> None:
    """Render results as a page with plots."""
    with extra("bench"):
        from cappy_bench.speed.report import write_report
    say(f"the page is {write_report(results, force=force)}")


@command(
    """
    examples:
      cappy bench list
    """,
    name="list",
    of=bench,
)
def list_runners() -> None:
    """Print the runners: tools in their settings."""
    show(setting_table(SPECS))


@command(
    """
    examples:
      cappy bench serve
      cappy bench serve --bundle cappy-bundle --threads 4 --soak 10
      cappy bench serve --infinity my-checkpoint --bundle cappy-bundle --out serve.json
      cappy bench serve --url http://127.0.0.1:8000

    The last line on stdout is the result as one JSON document. Options of the server that have no flag here are given
    as its variables, CAPPY_SERVE_NAME.
    """,
    of=bench,
)
@takes(LoadOptions)
@takes(ScorerOptions, "scorer", only=SERVED, section="Options of the server that is started")
@quiet_option
def serve(options: LoadOptions, scorer: ScorerOptions) -> None:
    """Measure `cappy serve` unloaded, saturated and overloaded, beside Scorer.score.

    Requests come at random times, whether or not earlier ones were answered, and latencies count from these times. The
    scores of all answers are compared with those of Scorer.score.
    """
    given = flags_given(SERVED)
    if options.url and given:
        raise click.UsageError(f"{given[0]} is for a server that is started, and --url names one that runs already")
    with extra("cpu,serve"):
        from cappy_bench.load.serve_measure import measure_load
    result = measure_load(options, _words(scorer), say=_say)
    show(load_tables(result))
    print_json(result, indent=None)


@command(
    """
    examples:
      cappy bench bulk
      cappy bench bulk --pairs 1000000 --out bulk.json
      cappy bench bulk --bundle cappy-bundle --format parquet --threads 4

    The last line on stdout is the result as one JSON document.
    """,
    of=bench,
)
@takes(BulkBenchOptions)
@takes(ScorerOptions, "scorer", only=SERVED, section="Options of the scorer")
@quiet_option
def bulk(options: BulkBenchOptions, scorer: ScorerOptions) -> None:
    """Measure `cappy score` on a file of short pairs, beside the scorer alone: pairs a second, and memory."""
    from cappy_bench.bulk.bulk_measure import bulk_table, measure_bulk

    result = measure_bulk(options, scorer, _words(scorer), say=_say)
    show(bulk_table(result))
    print_json(result, indent=None)


@command(
    """
    examples:
      cappy bench curve my-cappy curve.svg
      cappy bench curve my-cappy.training other-cappy/log.jsonl curve.png --force
    """,
    of=bench,
)
@click.argument("logs", type=PATH, nargs=-1, required=True, metavar="LOG...")
@click.argument("out", type=PATH, metavar="OUT")
@force_option
def curve(logs: Sequence[Path], out: Path, force: bool) -> None:
    """Draw logs of `cappy adapt`: loss, the gradient's norm and tokens a second.

    A LOG is what `cappy adapt` wrote, finished or not, or its log.jsonl. OUT ends in .svg, .png or .pdf.
    """
    with extra("bench"):
        from cappy_bench.quality.curve_plot import names_of, plot_curves, read_log
    found = [read_log(path, say=say) for path in logs]
    plot_curves(dict(zip(names_of(logs), found, strict=True)), out, force=force)
    show(str(out))


def _words(scorer: ScorerOptions) -> list[str]:
    """Write the options of SERVED that were given as words of a command."""
    values = {name: getattr(scorer, name) for name in SERVED}
    given = {name: value for name, value in values.items() if value not in (None, "auto")}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _say(line: str) -> None:
    say(f"{datetime.now(UTC):%H:%M:%S} {line}")
