"""`cappy export`, `adapt`, `verify` and `inspect`: from a checkpoint to a bundle whose scores are proven."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cappy_engine.bundle import EMBEDDED, PRECISIONS, TARGETS, open_bundle
from cappy_engine.cli import text
from cappy_engine.cli.arguments import (
    EXIT_OK,
    add_command,
    exit_on_termination,
    fraction,
    import_export,
    import_training,
    positive,
    print_json,
    say,
)
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.options import ExportOptions, VerifyOptions

EXPORT_EXAMPLES = """examples:
  cappy export btan2/cappy-large cappy-bundle --precision fp32 --precision int8
  cappy export ./my-checkpoint my-bundle --pairs my-pairs.jsonl --force
  cappy export ./my-checkpoint my-bundle --precision int8 --limit int8.min_spearman=0.99
  cappy export btan2/cappy-large cappy-bundle --target cpu --target cuda --precision fp32 --precision fp16
  cappy export btan2/cappy-large cappy-bundle --target tensorrt --precision fp16 --pairs my-pairs.jsonl --buckets 4"""

ADAPT_EXAMPLES = """examples:
  cappy adapt btan2/cappy-large train.jsonl my-cappy
  cappy adapt ./my-checkpoint train.jsonl my-cappy --held-out held-out.jsonl --epochs 3 --learning-rate 5e-5
  cappy adapt ./my-checkpoint train.jsonl my-cappy --resume
  cappy adapt btan2/cappy-large samples.jsonl my-cappy --from-samples
  accelerate launch --num_processes 4 -m cappy_engine.cli.main adapt btan2/cappy-large train.jsonl my-cappy

a line of TRAIN: {"instruction": "Is the sky blue?", "response": "Yes", "label": 1}
with --from-samples: {"instruction": "Add 2 and 3.", "references": ["5"], "samples": ["5", "It is 6."]}
the defaults are Cappy's recipe (arXiv 2311.06720)"""

VERIFY_EXAMPLES = """examples:
  cappy verify cappy-bundle --checkpoint btan2/cappy-large
  cappy verify cappy-bundle --checkpoint ./my-checkpoint --precision int8 --pairs my-pairs.jsonl"""

INSPECT_EXAMPLES = """examples:
  cappy inspect cappy-bundle
  cappy inspect cappy-bundle --json"""


def add_commands(commands: Any) -> None:
    """Add export, adapt, verify and inspect."""
    _add_export(commands)
    _add_adapt(commands)
    _add_verify(commands)
    _add_inspect(commands)


def _add_export(commands: Any) -> None:
    parser = add_command(
        commands, "export", _export, "turn a checkpoint into a bundle, after proving its scores right", EXPORT_EXAMPLES
    )
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
        "--buckets", type=positive, default=4,
        help="at most so many lengths for TensorRT's engines, chosen for those of --pairs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", action="append", choices=PRECISIONS, help="write only these of the CPU's precisions (default: all)"
    )
    parser.add_argument(
        "--float32-product", action="append", default=[], dest="float32_products", metavar="PART",
        help="leave matrix products whose names hold PART (layer.0/output/dense) in float32 under int8; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--accurate-int8", action="store_true",
        help="smaller errors in the CPU's int8 (a third of cappy-mini's); it is 3 to 15%% slower, and exports longer",
    )  # fmt: skip
    parser.add_argument("--revision", help="hub revision: a branch, tag or commit")
    parser.add_argument(
        "--max-length", type=positive, default=512, help="longest pair in tokens (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it exists, once the new one is proven")
    _add_parity_options(parser)


def _add_adapt(commands: Any) -> None:
    parser = add_command(
        commands, "adapt", _adapt, "fine-tune a checkpoint on your own pairs with labels", ADAPT_EXAMPLES
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a local folder, or a hub id")
    parser.add_argument(
        "train", type=Path, metavar="TRAIN", help="JSON Lines with instruction, response and label; may be a .gz"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--revision", help="hub revision: a branch, tag or commit")
    parser.add_argument(
        "--from-samples", action="store_true",
        help="TRAIN holds references and an LLM's samples; labels are 1, 0 for other references, ROUGE-L for samples",
    )  # fmt: skip
    parser.add_argument("--negatives", type=positive, default=1, help="other references per example (default: 1)")
    parser.add_argument("--held-out", type=Path, help="file of TRAIN's form to measure on (default: a part of TRAIN)")
    parser.add_argument(
        "--held-out-fraction",
        type=fraction,
        default=0.02,
        help="part of TRAIN that is held out (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--max-steps", type=positive, help="stop, and end the schedule, after so many steps")
    parser.add_argument("--batch-size", type=positive, default=128, help="pairs in a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="at its peak (default: %(default)s)")
    parser.add_argument(
        "--warmup-fraction", type=float, default=0.1, help="of all steps, before the peak (default: %(default)s)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--max-gradient-norm", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, help="default: the checkpoint's")
    parser.add_argument("--max-length", type=positive, default=512, help="in tokens (default: %(default)s)")
    parser.add_argument(
        "--max-batch-tokens", type=positive, default=4096,
        help="padded tokens computed at once; a step accumulates the gradients of several (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mixed-precision", choices=("auto", "no", "bf16", "fp16"), default="auto",
        help="auto: bf16 or fp16 where the GPU has it, none on a CPU",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--evaluate-every", type=positive, default=200, help="steps (default: %(default)s)")
    parser.add_argument("--save-every", type=positive, default=200, help="steps (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with a training that was stopped")


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands, "verify", _verify, "prove a bundle's scores on this machine against its checkpoint", VERIFY_EXAMPLES
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--checkpoint", required=True, help="a local folder, or a hub id")
    parser.add_argument("--revision", help="hub revision: a branch, tag or commit")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, dest="precisions", help="default: all")
    parser.add_argument("--json", action="store_true", help="print the parity report as JSON")
    _add_parity_options(parser)


def _add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "print what a bundle is, and how far its scores are from PyTorch's",
        INSPECT_EXAMPLES,
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", nargs="?", default=EMBEDDED, help="default: the package's own"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def _add_parity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", type=Path, help="JSON Lines with your own parity pairs (default: those of the package)"
    )
    parser.add_argument(
        "--limit", action="append", default=[], dest="limits", metavar="PRECISION.NAME=VALUE",
        help="change one parity limit: max_error, min_spearman or min_winner_agreement",
    )  # fmt: skip


def _export(options: argparse.Namespace) -> int:
    asked = ExportOptions(
        precisions=options.precisions or ("fp32",),
        targets=options.targets or ("cpu",),
        buckets=options.buckets,
        keep=options.keep,
        float32_products=options.float32_products,
        accurate_int8=options.accurate_int8,
        revision=options.revision,
        max_length=options.max_length,
        pairs=options.pairs,
        limits=options.limits,
    )
    pipeline = import_export("cappy_export.pipeline")
    with exit_on_termination():
        manifest = pipeline.export(options.checkpoint, options.bundle, asked, force=options.force, say=say)
    print(text.describe_parity(manifest["parity"]))
    print(f"wrote {options.bundle}")
    return EXIT_OK


def _adapt(options: argparse.Namespace) -> int:
    adaptation = import_training("cappy_export.adaptation.training")
    names = ("epochs", "max_steps", "batch_size", "learning_rate", "warmup_fraction", "weight_decay",
             "max_gradient_norm", "dropout", "max_length", "max_batch_tokens", "mixed_precision", "seed")  # fmt: skip
    try:
        recipe = Recipe(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise AdaptError(str(error)) from error
    with exit_on_termination(), _training_bar() as progress:
        adaptation.adapt(
            options.checkpoint,
            options.train,
            options.out,
            recipe,
            AdaptOptions(
                revision=options.revision,
                from_samples=options.from_samples,
                negatives=options.negatives,
                held_out_fraction=options.held_out_fraction,
                evaluate_every=options.evaluate_every,
                save_every=options.save_every,
                resume=options.resume,
            ),
            held_out=options.held_out,
            say=say,
            progress=progress,
        )
    print(f"wrote {options.out}")
    return EXIT_OK


def _verify(options: argparse.Namespace) -> int:
    pipeline = import_export("cappy_export.pipeline")
    parity = pipeline.verify(
        options.bundle,
        options.checkpoint,
        VerifyOptions(
            precisions=options.precisions, revision=options.revision, pairs=options.pairs, limits=options.limits
        ),
        say=say,
    )
    if options.json:
        print_json(parity)
    else:
        print(text.describe_parity(parity))
    return EXIT_OK


def _inspect(options: argparse.Namespace) -> int:
    document = open_bundle(options.bundle).manifest.document
    if options.json:
        print_json(document)
    else:
        print(text.describe_manifest(document))
    return EXIT_OK


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
