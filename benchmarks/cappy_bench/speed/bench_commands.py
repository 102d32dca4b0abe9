"""`cappy bench`: options in, calls out. What is heavy is imported where it is needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cappy_bench.peers import SPECS
from cappy_bench.speed.measure import SUITES, RunOptions, measure
from cappy_bench.speed.tables import change_tables, result_tables, setting_table
from cappy_bench.speed.workloads import DESCRIPTIONS

RESULTS = Path("benchmarks/results")

DESCRIPTION = """Benchmarks: parity and speed beside every peer.

    cappy bench run --suite quick --checkpoint export/cappy_mini/checkpoint --bundle BUNDLE --out RESULT.json
    cappy bench compare RESULT.json             every runner, workload by workload
    cappy bench compare BEFORE.json AFTER.json  what changed
    cappy bench report                          results/*.json as a page with plots

Numbers are useful tokens: padding counts for nothing. `run` prints its progress on standard error and, as its last line
on standard output, the result as one JSON document.
"""


def run(options: RunOptions) -> None:
    """Measure, write the result, print its tables, and the result as the last line."""
    result = measure(options, say=_say)
    print(result_tables(result))
    print(json.dumps(result, allow_nan=False, ensure_ascii=False))


def compare(paths: Sequence[Path]) -> None:
    """Print one result's tables, or what changed from the first to the second."""
    if len(paths) > 2:
        sys.exit("compare takes one result, or two")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if len(results) == 1:
        print(result_tables(results[0]))
    else:
        print(change_tables(*results, names=(paths[0].name, paths[1].name)))


def report(folder: Path) -> None:
    """Render every result of the folder as a page with plots."""
    from cappy_bench.speed.report import write_report  # it needs matplotlib

    write_report(folder)


def list_runners() -> None:
    """Print the runners with their settings."""
    print(setting_table(SPECS))


def _say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace) -> None:
    fields: Any = {name: getattr(options, name) for name in RunOptions.__dataclass_fields__}
    run(RunOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(function=_run)
    command.add_argument("--suite", choices=SUITES, default="quick")
    command.add_argument("--title", default="benchmarks")
    for name in ("checkpoint", "bundle", "out"):
        command.add_argument(f"--{name}", type=Path, required=True)
    command.add_argument("--work", type=Path, default=Path("bench"))
    command.add_argument("--runner", dest="runners", action="append", default=[], choices=[one.name for one in SPECS])
    command.add_argument("--environment", dest="environments", action="append", default=[])
    command.add_argument("--workload", dest="workloads", action="append", default=[], choices=list(DESCRIPTIONS))
    command.add_argument("--rounds", type=int)
    command.add_argument("--threads", type=int)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--max-seconds", type=float, default=60.0)
    command.add_argument("--pairs", type=Path)
    command.add_argument("--data", type=Path)
    command = commands.add_parser("compare", help="print a result, or what changed between two")
    command.set_defaults(function=lambda options: compare(options.results))
    command.add_argument("results", type=Path, nargs="+", help="one or two results")
    command = commands.add_parser("report", help="render results as a page with plots")
    command.set_defaults(function=lambda options: report(options.results))
    command.add_argument("--results", type=Path, default=RESULTS)
    command = commands.add_parser("list", help="print the runners and their settings")
    command.set_defaults(function=lambda options: list_runners())
    options = parser.parse_args(argv)
    options.function(options)


if __name__ == "__main__":
    main()
