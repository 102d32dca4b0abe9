"""`cappy`: arguments in, calls out. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cappy_engine import __version__, promptsource, report
from cappy_engine.bundle import EMBEDDED, PRECISIONS, TARGETS, open_bundle
from cappy_engine.errors import AdaptError, CappyError, InstallationError, ParityError
from cappy_engine.execution import MODES
from cappy_engine.files import Totals, score_lines
from cappy_engine.installation import (
    inspect_installation,
)
from cappy_engine.pairs import read_rows
from cappy_engine.preflight import (
    describe,
    diagnose,
)
from cappy_engine.scorer import Scorer
from cappy_engine.session import DEVICES, load_runtime
from cappy_engine.tuning import tune

EXIT_OK, EXIT_ERROR, EXIT_SKIPPED = 0, 1, 3

EXAMPLES = {
    "export": """examples:
  cappy export btan2/cappy-large cappy-bundle --precision fp32 --precision int8
  cappy export ./my-checkpoint my-bundle --pairs my-pairs.jsonl --force
  cappy export ./my-checkpoint my-bundle --precision int8 --limit int8.min_spearman=0.99
  cappy export btan2/cappy-large cappy-bundle --target cpu --target cuda --precision fp32 --precision fp16
  cappy export btan2/cappy-large cappy-bundle --target tensorrt --precision fp16 --pairs my-pairs.jsonl --buckets 4""",
    "adapt": """examples:
  cappy adapt btan2/cappy-large train.jsonl my-cappy
  cappy adapt ./my-checkpoint train.jsonl my-cappy --held-out held-out.jsonl --epochs 3 --learning-rate 5e-5
  cappy adapt ./my-checkpoint train.jsonl my-cappy --resume
  cappy adapt btan2/cappy-large samples.jsonl my-cappy --from-samples
  accelerate launch --num_processes 4 -m cappy_engine.cli adapt btan2/cappy-large train.jsonl my-cappy

a line of TRAIN: {"instruction": "Is the sky blue?", "response": "Yes", "label": 1}
with --from-samples: {"instruction": "Add 2 and 3.", "references": ["5"], "samples": ["5", "It is 6."]}
the defaults are Cappy's recipe (arXiv 2311.06720)""",
    "verify": """examples:
  cappy verify cappy-bundle --checkpoint btan2/cappy-large
  cappy verify cappy-bundle --checkpoint ./my-checkpoint --precision int8 --pairs my-pairs.jsonl""",
    "inspect": """examples:
  cappy inspect cappy-bundle
  cappy inspect cappy-bundle --json""",
    "score": """examples:
  cappy score pairs.jsonl --bundle cappy-bundle -o scored.jsonl
  zcat pairs.jsonl.gz | cappy score - --bundle cappy-bundle --precision int8 > scored.jsonl

a line of PAIRS: {"instruction": "Is the sky blue?", "response": "Yes"}
exit status: 0 all lines scored, 1 stopped by an error, 2 wrong usage, 3 some lines were skipped""",
    "tune": """examples:
  cappy tune cappy-bundle
  cappy tune cappy-bundle --precision int8 --pairs my-pairs.jsonl --seconds 60

the answer is kept in CAPPY_CACHE, else in XDG_CACHE_HOME/cappy-engine or ~/.cache/cappy-engine""",
    "evaluate": """examples:
  cappy evaluate promptsource promptsource.jsonl --bundle cappy-bundle --precision fp32 --precision int8
  cappy evaluate promptsource promptsource.jsonl --bundle cappy-bundle --against btan2/cappy-large --examples 500

a line: {"dataset_name": "RTE", "template_name": "GPT-3 style", "example_idx": 0, "instruction": ..., "response": ...,
"label": 1}; candidates of one example agree in the first three, and the best-scoring one is the answer""",
    "doctor": """examples:
  cappy doctor
  cappy doctor --device tensorrt

exit status: 0, whatever was found; with --device 1 if that device cannot be used""",
    "rank": """examples:
  cappy rank --bundle cappy-bundle --instruction "Is the sky blue?" --candidate Yes --candidate No
  cappy rank --bundle cappy-bundle --instruction "Is the sky blue?" --candidate Yes --candidate No --json
  cappy rank --bundle cappy-bundle --precision int8 --exact-winner --instruction "Yes?" --candidate a --candidate b""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a text must not stop us
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    try:
        return int(options.run(options))
    except ParityError as error:
        _say(f"{report.describe_parity(error.report)}\ncappy {options.command}: {error}")
    except CappyError as error:
        _say(f"cappy {options.command}: {error}")
    except BrokenPipeError:  # the reader of our stdout went away (`cappy score ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"cappy {options.command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"cappy {options.command}: interrupted", file=sys.stderr)
        return 130
    return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cappy", description="Score (instruction, response) pairs with Cappy.")
    parser.add_argument("--version", action="version", version=f"cappy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_export(commands)
    _add_adapt(commands)
    _add_verify(commands)
    inspect = _add(commands, "inspect", _inspect, "print what a bundle is, and how far its scores are from PyTorch's")
    inspect.add_argument(
        "bundle", type=Path, metavar="BUNDLE", nargs="?", default=EMBEDDED, help="default: the package's own"
    )
    inspect.add_argument("--json", action="store_true", help="print the manifest as JSON")
    _add_score(commands)
    _add_rank(commands)
    _add_tune(commands)
    _add_evaluate(commands)
    doctor = _add(commands, "doctor", _doctor, "say what each device needs, what is missing here, and how to get it")
    doctor.add_argument("--device", choices=DEVICES, help="only this one, and exit with 1 if it cannot be used")
    return parser


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="say more on stderr")
    parser.set_defaults(run=run)
    return parser


def _add_export(commands: Any) -> None:
    parser = _add(commands, "export", _export, "turn a checkpoint into a bundle, after proving its scores right")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a local folder, or a hub id such as btan2/cappy-large"
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder to write")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="repeat for several (default: fp32)", dest="precisions"
    )
    parser.add_argument(
        "--target", action="append", choices=tuple(TARGETS), dest="targets",
        help="a device to export for, in those of the precisions that it runs; repeatable (default: cpu)",
    )  # fmt: skip
    parser.add_argument(
        "--buckets", type=_positive, default=4,
        help="at most so many lengths for TensorRT's engines, chosen for those of --pairs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", action="append", choices=PRECISIONS, help="write only these of the CPU's precisions (default: all)"
    )
    parser.add_argument(
        "--float32-product", action="append", default=[], dest="float32_products", metavar="PART",
        help="leave matrix products whose names hold PART (layer.0/output/dense) in float32 under int8; repeatable",
    )  # fmt: skip
    parser.add_argument("--revision", help="hub revision: a branch, tag or commit")
    parser.add_argument(
        "--max-length", type=_positive, default=512, help="longest pair in tokens (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it exists, once the new one is proven")
    _add_parity_options(parser)


def _add_adapt(commands: Any) -> None:
    parser = _add(commands, "adapt", _adapt, "fine-tune a checkpoint on your own pairs with labels")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a local folder, or a hub id")
    parser.add_argument("train", type=Path, metavar="TRAIN", help="JSON Lines with instruction, response and label")
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--revision", help="hub revision: a branch, tag or commit")
    parser.add_argument(
        "--from-samples", action="store_true",
        help="TRAIN holds references and an LLM's samples; labels are 1, 0 for other references, ROUGE-L for samples",
    )  # fmt: skip
    parser.add_argument("--negatives", type=_positive, default=1, help="other references per example (default: 1)")
    parser.add_argument("--held-out", type=Path, help="file of TRAIN's form to measure on (default: a part of TRAIN)")
    parser.add_argument(
        "--held-out-fraction",
        type=_fraction,
        default=0.02,
        help="part of TRAIN that is held out (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=_positive, default=1, help="default: %(default)s")
    parser.add_argument("--max-steps", type=_positive, help="stop, and end the schedule, after so many steps")
    parser.add_argument("--batch-size", type=_positive, default=128, help="pairs in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="at its peak (default: %(default)s)")
    parser.add_argument(
        "--warmup-fraction", type=float, default=0.1, help="of all steps, before the peak (default: %(default)s)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--max-gradient-norm", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, help="default: the checkpoint's")
    parser.add_argument("--max-length", type=_positive, default=512, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--max-batch-tokens", type=_positive, default=4096,
        help="padded tokens computed at once; a step accumulates the gradients of several (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mixed-precision", choices=("auto", "no", "bf16", "fp16"), default="auto",
        help="auto: bf16 or fp16 where the GPU has it, none on a CPU",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--evaluate-every", type=_positive, default=200, help="steps (default: %(default)s)")
    parser.add_argument("--save-every", type=_positive, default=200, help="steps (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was stopped")


def _add_verify(commands: Any) -> None:
    parser = _add(commands, "verify", _verify, "prove a bundle's scores on this machine against its checkpoint")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--checkpoint", required=True, help="a local folder, or a hub id")
    parser.add_argument("--revision", help="hub revision: a branch, tag or commit")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, dest="precisions", help="default: all")
    parser.add_argument("--json", action="store_true", help="print the parity report as JSON")
    _add_parity_options(parser)


def _add_parity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", type=Path, help="JSON Lines with your own parity pairs (default: those of the package)"
    )
    parser.add_argument(
        "--limit", action="append", default=[], dest="limits", metavar="PRECISION.NAME=VALUE",
        help="change one parity limit: max_error, min_spearman or min_winner_agreement",
    )  # fmt: skip


def _add_score(commands: Any) -> None:
    parser = _add(commands, "score", _score, "score the pairs of a JSON Lines file")
    parser.add_argument("pairs", metavar="PAIRS", help="JSON Lines file, - for stdin")
    _add_scorer_options(parser)
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: stdout)")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a bad line (default: stop)")
    parser.add_argument(
        "--score-field", type=_field_name, default="score", help="name of the field to add (default: score)"
    )


def _add_rank(commands: Any) -> None:
    parser = _add(commands, "rank", _rank, "rank the candidates of one instruction, best first")
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
    parser = _add(commands, "tune", _tune, "measure how this machine scores a bundle fastest, and keep the answer")
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: cappy-mini, the package's own")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument("--pairs", type=Path, help="JSON Lines with instruction and response (default: made-up pairs)")
    parser.add_argument("--seconds", type=_seconds, default=20.0, help="how long to measure (default: %(default)g)")


def _add_evaluate(commands: Any) -> None:
    parser = _add(commands, "evaluate", _evaluate, "measure accuracy by Cappy's zero-shot protocol")
    parser.add_argument("protocol", choices=("promptsource",))
    parser.add_argument("examples_file", metavar="FILE", help="JSON Lines file, - for stdin")
    parser.add_argument("--bundle", type=Path, help="default: cappy-mini, the package's own")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, dest="precisions", help="repeat to compare (default: auto)"
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument("--against", metavar="CHECKPOINT", help="score with PyTorch too, and compare the decisions")
    parser.add_argument("--revision", help="hub revision of CHECKPOINT: a branch, tag or commit")
    parser.add_argument("--examples", type=_positive, help="only so many of each dataset, the first ones")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _add_scorer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, help="default: cappy-mini, the package's own")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto")
    parser.add_argument(
        "--gpu", type=int, action="append", dest="gpus", metavar="NUMBER", help="repeat to share work (default: 0)"
    )
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: one for each usable core)")
    parser.add_argument(
        "--mode",
        choices=("auto", *MODES),
        default="auto",
        help="all threads on one batch, one for each of several, or both with the weights held twice (default: auto)",
    )
    parser.add_argument(
        "--max-batch-tokens", type=_positive, help="tokens in a batch (default: as tuned, or by device)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and less than 1, got {value}")
    return value


def _field_name(text: str) -> str:
    if text in ("", "instruction", "response"):
        raise argparse.ArgumentTypeError(f"must be a name of its own, got {text!r}")
    return text


def _export(options: argparse.Namespace) -> int:
    pipeline = _import_export()
    with _exit_on_termination():
        manifest = pipeline.export(
            options.checkpoint,
            options.bundle,
            precisions=options.precisions or ("fp32",),
            targets=options.targets or ("cpu",),
            buckets=options.buckets,
            keep=options.keep,
            float32_products=options.float32_products,
            revision=options.revision,
            max_length=options.max_length,
            pairs=options.pairs,
            limits=pipeline.parse_limits(options.limits),
            force=options.force,
            say=_say,
        )
    print(report.describe_parity(manifest["parity"]))
    print(f"wrote {options.bundle}")
    return EXIT_OK


def _adapt(options: argparse.Namespace) -> int:
    adaptation, examples, samples = (_import_training(name) for name in ("adapt", "examples", "samples"))

    def read(path: Path) -> Any:
        if not options.from_samples:
            return examples.read_examples(path)
        return samples.examples_from_samples(samples.read_samples(path), negatives=options.negatives, seed=options.seed)

    names = ("epochs", "max_steps", "batch_size", "learning_rate", "warmup_fraction", "weight_decay",
             "max_gradient_norm", "dropout", "max_length", "max_batch_tokens", "mixed_precision", "seed")  # fmt: skip
    try:
        recipe = adaptation.Recipe(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise AdaptError(str(error)) from error
    with _exit_on_termination(), _training_bar() as progress:
        adaptation.adapt(
            options.checkpoint,
            read(options.train),
            options.out,
            held_out=None if options.held_out is None else read(options.held_out),
            held_out_fraction=options.held_out_fraction,
            recipe=recipe,
            evaluate_every=options.evaluate_every,
            save_every=options.save_every,
            resume=options.resume,
            revision=options.revision,
            say=_say,
            progress=progress,
        )
    print(f"wrote {options.out}")
    return EXIT_OK


def _verify(options: argparse.Namespace) -> int:
    pipeline = _import_export()
    parity = pipeline.verify(
        options.bundle,
        options.checkpoint,
        precisions=options.precisions,
        revision=options.revision,
        pairs=options.pairs,
        limits=pipeline.parse_limits(options.limits),
        say=_say,
    )
    if options.json:
        _print_json(parity)
    else:
        print(report.describe_parity(parity))
    return EXIT_OK


def _inspect(options: argparse.Namespace) -> int:
    document = open_bundle(options.bundle).manifest.document
    if options.json:
        _print_json(document)
    else:
        print(report.describe_manifest(document))
    return EXIT_OK


def _rank(options: argparse.Namespace) -> int:
    with _open_scorer(options) as scorer:
        ranked = scorer.rank(options.instruction, options.candidates, exact_winner=options.exact_winner)
    if options.json:
        _print_json(
            [{"index": c.index, "response": c.response, "score": c.score, "is_exact": c.is_exact} for c in ranked]
        )
    else:
        print(report.describe_ranking(ranked))
    truncated = sum(candidate.is_truncated for candidate in ranked)
    if truncated:
        _say(f"{truncated} of {len(ranked)} pairs were truncated")
    if options.exact_winner:
        _say(f"{sum(candidate.is_exact for candidate in ranked)} of {len(ranked)} candidates were scored again in fp32")
    return EXIT_OK


def _tune(options: argparse.Namespace) -> int:
    pairs = None
    if options.pairs is not None:
        with options.pairs.open("rb") as lines:
            pairs = [row.pair for row in read_rows(lines)]
        if not pairs:
            raise CappyError(f'{options.pairs} holds no pairs; a line is {{"instruction": ..., "response": ...}}')
    found = tune(
        options.bundle,
        precision=options.precision,
        threads=options.threads,
        pairs=pairs,
        seconds=options.seconds,
        say=_say if options.verbose else lambda text: None,
    )
    print(report.describe_tuned(found))
    return EXIT_OK


def _score(options: argparse.Namespace) -> int:
    with (
        _open_scorer(options) as scorer,
        _input(options.pairs) as lines,
        _output(options.output, lines) as output,
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
    _say(report.describe_totals(totals, seconds))
    return EXIT_SKIPPED if totals.skipped else EXIT_OK


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
    _say(report.describe_info(scorer.info))
    return scorer


@contextlib.contextmanager
def _input(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
    else:
        with Path(name).open("rb") as file:
            yield file


@contextlib.contextmanager
def _output(path: Path | None, source: BinaryIO) -> Iterator[BinaryIO]:
    """Stdout, or a file that appears under its name only when everything was written.

    What is there and no regular file (a pipe, a device) is written to as it is.
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
    if partial.exists() and os.path.samestat(os.fstat(source.fileno()), partial.stat()):
        raise FileExistsError(errno.EEXIST, "the input has the name of our unfinished output; rename it", str(partial))
    file = partial.open("wb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (CappyError, OSError, KeyboardInterrupt):
        _say(f"what was scored before this is in {partial}")
        raise
    partial.replace(path)


def _evaluate(options: argparse.Namespace) -> int:
    with _input(options.examples_file) as lines:
        pairs, examples = promptsource.read_examples(lines)
    if not examples:
        raise CappyError(f"{options.examples_file} holds no examples; see 'cappy evaluate --help' for a line's form")
    pairs, examples = promptsource.first_examples(pairs, examples, options.examples)
    scores = {}
    if options.against is not None:
        _say(f"scoring {len(pairs)} pairs with PyTorch")
        score = _import_export("reference").score_checkpoint
        scores["PyTorch"] = score(options.against, pairs, revision=options.revision)
    for precision in options.precisions or ["auto"]:
        with Scorer.open(options.bundle, device=options.device, precision=precision, threads=options.threads) as scorer:
            _say(report.describe_info(scorer.info))
            scores[scorer.info.precision] = scorer.score(pairs)
    columns = {name: promptsource.accuracies(examples, found) for name, found in scores.items()}
    first, *others = scores
    agreements = {
        f"{name} against {first}": promptsource.compare(examples, scores[first], scores[name]) for name in others
    }
    if options.json:
        _print_json(report.evaluation_document(columns, agreements))
    else:
        print(report.describe_evaluation(columns, agreements))
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


@contextlib.contextmanager
def _progress_bar(lines: BinaryIO) -> Iterator[Any]:
    """Yield a callable for `score_lines` that shows pairs/s, tokens/s and the time left, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda totals: None
        return
    from tqdm import tqdm

    size = os.fstat(lines.fileno()).st_size or None
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


@contextlib.contextmanager
def _training_bar() -> Iterator[Any]:
    """Yield a callable for `adapt` that shows the loss, tokens/s and the time left, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from tqdm import tqdm

    loss: float | None = None
    with tqdm(unit="step", leave=False, dynamic_ncols=True) as bar:

        def show(progress: Any) -> None:
            nonlocal loss
            loss = progress.loss if loss is None else 0.95 * loss + 0.05 * progress.loss
            if bar.total is None:
                bar.total, bar.n, bar.initial = progress.steps, progress.step - 1, progress.step - 1
            held_out = "".join(
                f", {name.replace('_', ' ')} {value:.3f}" for name, value in (progress.held_out or {}).items()
            )
            bar.set_postfix_str(f"loss {loss:.4f}{held_out}", refresh=False)
            bar.update()

        yield show


@contextlib.contextmanager
def _exit_on_termination() -> Iterator[None]:
    """Leave by an exception at SIGTERM, so that unfinished files are removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _import_export(module: str = "pipeline", extras: str = "cpu,export") -> Any:
    """Import a module of cappy_export, whose packages are not installed in production."""
    try:
        return importlib.import_module(f"cappy_export.{module}")
    except ModuleNotFoundError as error:
        raise InstallationError(
            f"this command needs the package {error.name!r}; run: pip install 'cappy-engine[{extras}]'"
        ) from error


def _import_training(module: str) -> Any:
    return _import_export(module, "cpu,export,train")


def _print_json(value: object) -> None:
    """JSON is UTF-8 whatever the terminal's encoding is."""
    sys.stdout.buffer.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
