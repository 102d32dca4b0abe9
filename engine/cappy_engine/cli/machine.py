"""`cappy tune`, `cappy plan` and `cappy doctor`: what this machine can do, and how fast."""

from __future__ import annotations

from pathlib import Path

import click

from cappy_engine.bulk.estimate import estimate, sample_file
from cappy_engine.bulk.formats.json_lines import open_lines, read_rows
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bundle import EMBEDDED
from cappy_engine.cli import text
from cappy_engine.cli.arguments import EXIT_ERROR, EXIT_OK, bundle_option, command, flags_given, quiet_option, takes
from cappy_engine.cli.streams import is_verbose, say, show
from cappy_engine.cli.values import PATH, Real, Words
from cappy_engine.cpu.kernels import Kernels, find_kernels
from cappy_engine.cpu.processor import describe_processor, read_processor
from cappy_engine.errors import CappyError, InstallationError
from cappy_engine.gpu.installation import inspect_installation
from cappy_engine.gpu.preflight import describe, diagnose
from cappy_engine.native.build import read_note
from cappy_engine.options import ScorerOptions
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.session import DEVICES
from cappy_engine.storage import cache_folder
from cappy_engine.tuning import forget
from cappy_engine.tuning import tune as measure


@command(
    """
    examples:
      cappy tune cappy-bundle
      cappy tune cappy-bundle --precision int8 --pairs my-pairs.jsonl --seconds 60
      cappy tune cappy-bundle --clear

    the answer is kept in CAPPY_CACHE, else in XDG_CACHE_HOME/cappy-engine or ~/.cache/cappy-engine
    """
)
@click.argument("bundle", type=PATH, required=False, metavar="[BUNDLE]")
@takes(ScorerOptions, only=("precision", "threads"))
@click.option("--pairs", type=PATH, help="JSON Lines with instruction and response (default: made-up pairs)")
@click.option(
    "--seconds",
    type=Real(min=0, min_open=True),
    default=20,
    show_default=True,
    metavar="NUMBER",
    help="how long to measure",
)
@click.option("--clear", is_flag=True, help="forget the answers for BUNDLE (default: for every bundle) instead")
def tune(bundle: Path | None, options: ScorerOptions, pairs: Path | None, seconds: float, clear: bool) -> None:
    """Measure how this machine scores a bundle fastest, and keep the answer.

    Without BUNDLE it is cappy-mini, the package's own.
    """
    if clear:
        for flag in flags_given(("precision", "threads", "pairs", "seconds")):
            raise click.UsageError(f"{flag} is for measuring; --clear forgets the answers for all of BUNDLE's models")
        count = forget() if bundle is None else forget(bundle)
        show(f"forgot {count} answer{'' if count == 1 else 's'} in {cache_folder()}")
        return
    found = measure(
        EMBEDDED if bundle is None else bundle,
        precision=options.precision,
        threads=options.threads,
        pairs=None if pairs is None else _read_pairs(pairs),
        seconds=seconds,
        say=say if is_verbose() else lambda text: None,
    )
    show(text.describe_tuned(found))


@command(
    """
    examples:
      cappy plan pairs.jsonl
      cappy plan samples.parquet --bundle cappy-bundle --precision int8 --seconds 30

    only some rows are read; docs/scaling.md has the formula, and what clusters cost
    """
)
@click.argument("file", type=PATH, metavar="FILE")
@bundle_option
@takes(ScorerOptions)
@takes(ScoreTask, "task", only=("instruction_column", "response_column", "score_field"), section="Columns")
@click.option(
    "--seconds",
    type=Real(min=0, min_open=True),
    default=10,
    show_default=True,
    metavar="NUMBER",
    help="how long to measure",
)
@quiet_option
def plan(file: Path, bundle: Path, options: ScorerOptions, task: ScoreTask, seconds: float) -> None:
    """Estimate what `cappy score FILE` takes on this machine: time, memory and disk.

    FILE is JSON Lines, CSV or Parquet, as its name tells; .gz or .zst may stand behind.
    """
    sample = sample_file(file, task)
    with Scorer.open_with(bundle, options) as scorer:
        say(text.describe_info(scorer.info))
        show(text.describe_estimate(estimate(scorer, sample, seconds=seconds)))


@command(
    """
    examples:
      cappy doctor
      cappy doctor --device tensorrt

    exit status: 0, whatever was found; with --device 1 if that device cannot be used
    """
)
@click.option("--device", type=Words(DEVICES), help="tell all about devices; exit with 1 if this one cannot be used")
def doctor(device: str | None) -> int:
    """Say what this machine offers, what a device lacks here, and how to get it."""
    installation = inspect_installation()  # ONNX Runtime may fail to be imported: then that is the finding
    findings = {name: diagnose(installation, name) for name in DEVICES}
    if device in (None, "cpu"):
        show(describe_processor(read_processor()))
        show(f"{text.describe_kernels(_look_for_kernels(), read_note())}\n")
    is_gpu_wanted = device is not None or "onnxruntime-gpu" in installation.runtime_packages
    show(describe(findings, installation) if is_gpu_wanted else text.describe_cpu_only(findings, installation))
    is_usable = device is None or all(finding.is_ok for finding in findings[device])
    return EXIT_OK if is_usable else EXIT_ERROR


def _look_for_kernels() -> Kernels:
    """Find the kernels, or what keeps them from being used."""
    try:
        return find_kernels()
    except InstallationError as error:
        return Kernels(None, "", str(error))


def _read_pairs(path: Path) -> list[Pair]:
    with open_lines(path) as lines:
        pairs = [row.pair for row in read_rows(lines)]
    if not pairs:
        raise CappyError(f'{path} holds no pairs; a line is {{"instruction": ..., "response": ...}}')
    return pairs
