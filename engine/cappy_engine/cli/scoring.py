"""`cappy score`, `rank`, `tune` and `doctor`: a bundle at work."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine.bulk.jsonl import open_lines
from cappy_engine.bulk.rows import read_rows
from cappy_engine.bulk.score_file import Totals, score_lines
from cappy_engine.bundle import PRECISIONS
from cappy_engine.cli import text
from cappy_engine.cli.arguments import (
    EXIT_ERROR,
    EXIT_OK,
    EXIT_SKIPPED,
    add_command,
    open_input,
    open_output,
    positive,
    print_json,
    say,
    seconds_above_0,
)
from cappy_engine.cpu.execution import MODES
from cappy_engine.errors import CappyError
from cappy_engine.gpu.installation import inspect_installation
from cappy_engine.gpu.preflight import describe, diagnose
from cappy_engine.scorer import Scorer
from cappy_engine.session import DEVICES, load_runtime
from cappy_engine.tuning import tune

SCORE_EXAMPLES = """examples:
  cappy score pairs.jsonl --bundle cappy-bundle -o scored.jsonl
  cappy score pairs.jsonl.gz --bundle cappy-bundle --precision int8 > scored.jsonl
  my-program | cappy score - --bundle cappy-bundle

a line of PAIRS: {"instruction": "Is the sky blue?", "response": "Yes"}
exit status: 0 all lines scored, 1 stopped by an error, 2 wrong usage, 3 some lines were skipped"""

RANK_EXAMPLES = """examples:
  cappy rank --bundle cappy-bundle --instruction "Is the sky blue?" --candidate Yes --candidate No
  cappy rank --bundle cappy-bundle --instruction "Is the sky blue?" --candidate Yes --candidate No --json
  cappy rank --bundle cappy-bundle --precision int8 --exact-winner --instruction "Yes?" --candidate a --candidate b"""

TUNE_EXAMPLES = """examples:
  cappy tune cappy-bundle
  cappy tune cappy-bundle --precision int8 --pairs my-pairs.jsonl --seconds 60

the answer is kept in CAPPY_CACHE, else in XDG_CACHE_HOME/cappy-engine or ~/.cache/cappy-engine"""

DOCTOR_EXAMPLES = """examples:
  cappy doctor
  cappy doctor --device tensorrt

exit status: 0, whatever was found; with --device 1 if that device cannot be used"""


def add_commands(commands: Any) -> None:
    """Add score, rank, tune and doctor."""
    _add_score(commands)
    _add_rank(commands)
    _add_tune(commands)
    _add_doctor(commands)


def _add_score(commands: Any) -> None:
    parser = add_command(commands, "score", _score, "score the pairs of a JSON Lines file", SCORE_EXAMPLES)
    parser.add_argument("pairs", metavar="PAIRS", help="JSON Lines file, may be a .gz; - for stdin")
    _add_scorer_options(parser)
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: stdout)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a bad line (default: stop)")
    parser.add_argument(
        "--score-field", type=_field_name, default="score", help="name of the field to add (default: score)"
    )


def _add_rank(commands: Any) -> None:
    parser = add_command(commands, "rank", _rank, "rank the candidates of one instruction, best first", RANK_EXAMPLES)
    _add_scorer_options(parser)
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--candidate", action="append", required=True, dest="candidates", help="repeat for each")
    parser.add_argument("--json", action="store_true", help="print a JSON list of {index, response, score, is_exact}")
    parser.add_argument(
        "--exact-winner",
        action="store_true",
        help="score again in fp32 the candidates between which int8's error could decide",
    )


def _add_tune(commands: Any) -> None:
    parser = add_command(
        commands, "tune", _tune, "measure how this machine scores a bundle fastest, and keep the answer", TUNE_EXAMPLES
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: cappy-mini, the package's own")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument("--pairs", type=Path, help="JSON Lines with instruction and response (default: made-up pairs)")
    parser.add_argument(
        "--seconds", type=seconds_above_0, default=20.0, help="how long to measure (default: %(default)g)"
    )


def _add_doctor(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        "say what each device needs, what is missing here, and how to get it",
        DOCTOR_EXAMPLES,
    )
    parser.add_argument("--device", choices=DEVICES, help="only this one, and exit with 1 if it cannot be used")


def _add_scorer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, help="default: cappy-mini, the package's own")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")
    parser.add_argument(
        "--gpu", type=int, action="append", dest="gpus", metavar="NUMBER", help="repeat to share work (default: 0)"
    )
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument(
        "--mode",
        choices=("auto", *MODES),
        default="auto",
        help="all threads on one batch, one for each of several, or both with the weights held twice (default: auto)",
    )
    parser.add_argument("--max-batch-tokens", type=positive, help="tokens in a batch (default: as tuned, or by device)")


def _field_name(text: str) -> str:
    if text in ("", "instruction", "response"):
        raise argparse.ArgumentTypeError(f"must be a name of its own, got {text!r}")
    return text


def _score(options: argparse.Namespace) -> int:
    with (
        _open_scorer(options) as scorer,
        open_input(options.pairs) as lines,
        open_output(options.output, lines) as output,
        _progress_bar(lines) as progress,
    ):
        started = time.monotonic()
        totals = score_lines(
            scorer,
            lines,
            output.write,
            on_error=options.on_error,
            field_name=options.score_field,
            progress=progress,
        )
        seconds = time.monotonic() - started
    say(text.describe_totals(totals, seconds))
    return EXIT_SKIPPED if totals.skipped else EXIT_OK


def _rank(options: argparse.Namespace) -> int:
    with _open_scorer(options) as scorer:
        ranked = scorer.rank(options.instruction, options.candidates, exact_winner=options.exact_winner)
    if options.json:
        print_json(
            [{"index": c.index, "response": c.response, "score": c.score, "is_exact": c.is_exact} for c in ranked]
        )
    else:
        print(text.describe_ranking(ranked))
    truncated = sum(candidate.is_truncated for candidate in ranked)
    if truncated:
        say(f"{truncated} of {len(ranked)} pairs were truncated")
    if options.exact_winner:
        say(f"{sum(candidate.is_exact for candidate in ranked)} of {len(ranked)} candidates were scored again in fp32")
    return EXIT_OK


def _tune(options: argparse.Namespace) -> int:
    pairs = None
    if options.pairs is not None:
        with open_lines(options.pairs) as lines:
            pairs = [row.pair for row in read_rows(lines)]
        if not pairs:
            raise CappyError(f'{options.pairs} holds no pairs; a line is {{"instruction": ..., "response": ...}}')
    found = tune(
        options.bundle,
        precision=options.precision,
        threads=options.threads,
        pairs=pairs,
        seconds=options.seconds,
        say=say if options.verbose else lambda text: None,
    )
    print(text.describe_tuned(found))
    return EXIT_OK


def _doctor(options: argparse.Namespace) -> int:
    """The installation is looked at without ONNX Runtime where that cannot be imported: then this is the finding."""
    installation = inspect_installation(
        available_providers=lambda: load_runtime().get_available_providers(),
        preload=lambda: getattr(load_runtime(), "preload_dlls", lambda: None)(),
    )
    findings = {device: diagnose(installation, device) for device in DEVICES}
    print(describe(findings, installation))
    is_usable = options.device is None or all(finding.is_ok for finding in findings[options.device])
    return EXIT_OK if is_usable else EXIT_ERROR


def _open_scorer(options: argparse.Namespace) -> Scorer:
    scorer = Scorer.open(
        options.bundle,
        device=options.device,
        gpus=options.gpus,
        precision=options.precision,
        threads=options.threads,
        mode=options.mode,
        max_batch_tokens=options.max_batch_tokens,
    )
    say(text.describe_info(scorer.info))
    return scorer


@contextlib.contextmanager
def _progress_bar(lines: BinaryIO) -> Iterator[Any]:
    """Yield a callable for `score_lines` that shows pairs/s, tokens/s and the time left, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda totals: None
        return
    from tqdm import tqdm

    is_plain = not isinstance(lines, gzip.GzipFile)  # how long a .gz is when unpacked nobody knows before
    size = (os.fstat(lines.fileno()).st_size or None) if is_plain else None
    layout = "{percentage:3.0f}%|{bar}| {postfix}, {remaining} left" if size else "{postfix} in {elapsed}"
    started = time.monotonic()
    with tqdm(total=size, bar_format=layout, leave=False) as bar:

        def show(totals: Totals) -> None:
            seconds = time.monotonic() - started
            bar.set_postfix_str(
                f"{totals.pairs} pairs, {totals.pairs / seconds:.1f} pairs/s, {totals.tokens / seconds:.0f} tokens/s",
                refresh=False,
            )
            bar.update(totals.bytes_scored - bar.n)

        yield show
