"""`cappy export`, `cappy adapt` and `cappy verify`: from a checkpoint to a bundle whose scores are proven."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cappy_engine.cli import text
from cappy_engine.cli.arguments import command, flags_given, takes
from cappy_engine.cli.extras import extra
from cappy_engine.cli.progress import progress_bar
from cappy_engine.cli.streams import print_json, say, show, tell, words_given
from cappy_engine.cli.values import PATH, Words
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.recipe import RECIPES, AdaptOptions, Recipe
from cappy_export.options import ExportOptions, VerifyOptions

if TYPE_CHECKING:
    from cappy_export.adaptation.log import Progress


@command(
    """
    examples:
      cappy export btan2/cappy-large cappy-bundle --precision fp32 --precision int8
      cappy export ./my-checkpoint my-bundle --pairs my-pairs.jsonl --force
      cappy export ./my-checkpoint my-bundle --precision int8 --limit int8.min_spearman=0.99
      cappy export btan2/cappy-large cappy-bundle --target cpu --target cuda --precision fp32 --precision fp16
      cappy export btan2/cappy-large cappy-bundle --target tensorrt --precision fp16 --pairs my-pairs.jsonl --buckets 4
    """
)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("bundle", type=PATH, metavar="BUNDLE")
@takes(ExportOptions)
@click.option("--force", is_flag=True, help="replace BUNDLE if it exists, once the new one is proven")
def export(checkpoint: str, bundle: Path, options: ExportOptions, force: bool) -> None:
    """Turn a checkpoint into a bundle, after proving its scores right.

    CHECKPOINT is a local folder, or a hub id such as btan2/cappy-large. BUNDLE is the folder to write.
    """
    with extra("cpu,export"):
        from cappy_export import pipeline
    manifest = pipeline.export(checkpoint, bundle, options, force=force, say=say)
    tell(f"{text.describe_parity(manifest['parity'])}\nwrote {bundle}")


def _refuse_given(name: str, problem: str) -> None:
    """Refuse, as wrong usage, an option that would change nothing, if it was given."""
    for flag in flags_given([name]):
        raise click.UsageError(f"{flag} {problem}")


def _take_defaults(ctx: click.Context, param: click.Parameter, name: str) -> None:
    """Make a recipe's numbers the defaults of the options."""
    recipe, options = RECIPES[name]
    ctx.default_map = dataclasses.asdict(recipe) | dataclasses.asdict(options)


@command(
    """
    examples:
      cappy adapt btan2/cappy-large train.jsonl my-cappy
      cappy adapt ./my-checkpoint train.jsonl my-cappy --held-out held-out.jsonl --epochs 3 --learning-rate 5e-5
      cappy adapt ./my-checkpoint train.jsonl my-cappy --resume
      cappy adapt btan2/cappy-large samples.jsonl my-cappy --from-samples
      cappy adapt roberta-large shards/ my-cappy --recipe pretraining --processes 8
      cappy adapt btan2/cappy-large train.jsonl my-cappy --processes 4
      torchrun --nproc-per-node 4 -m cappy_engine adapt btan2/cappy-large train.jsonl my-cappy

    a line of TRAIN: {"instruction": "Is the sky blue?", "response": "Yes", "label": 1}
    with --from-samples: {"instruction": "Add 2 and 3.", "references": ["5"], "samples": ["5", "It is 6."]}
    the defaults are Cappy's recipe (arXiv 2311.06720)
    """
)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("train", type=PATH, metavar="TRAIN")
@click.argument("out", type=PATH, metavar="OUT")
@click.option(
    "--recipe",
    "recipe_name",
    type=Words(tuple(RECIPES)),
    default="adaptation",
    is_eager=True,
    expose_value=False,
    callback=_take_defaults,
    help="defaults of other options; pretraining: batches of 1024, learning rate 1e-05, 16384 tokens at once, 0.001 "
    "held out, measured and saved every 1000 steps (default: adaptation)",
)
@click.option("--held-out", type=PATH, help="file of TRAIN's form to measure on (default: a part of TRAIN)")
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="processes to train in on this machine",
)
@takes(AdaptOptions)
@takes(Recipe, "recipe")
def adapt(
    checkpoint: str,
    train: Path,
    out: Path,
    held_out: Path | None,
    processes: int | None,
    options: AdaptOptions,
    recipe: Recipe,
) -> int | None:
    """Fine-tune a checkpoint on your own pairs with labels.

    CHECKPOINT is a local folder, or a hub id; an encoder without Cappy's head gets a new one. TRAIN is a file of JSON
    Lines, CSV or Parquet, packed or not, a folder of such files, or a pattern in quotes. OUT is the checkpoint to
    write.
    """
    if not options.from_samples:
        _refuse_given("negatives", "goes with --from-samples")
    if held_out is not None:
        _refuse_given(
            "held_out_fraction", "is of TRAIN, of which nothing is held out with --held-out; give one of the two"
        )
    launched = os.environ.get("WORLD_SIZE") if os.environ.get("LOCAL_RANK") else None
    if processes is not None and launched not in (None, str(processes)):
        raise AdaptError(f"--processes is {processes}, but a launcher started {launched} processes; leave it out")
    if processes is not None and processes > 1 and launched is None:
        with extra("cpu,export,train"):
            from cappy_export.adaptation.processes import start_processes
        return start_processes(["adapt", *words_given()], processes=processes)
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # or each process says how it could be faster, where it may not
    with extra("cpu,export,train"):
        from cappy_export.adaptation import training
    with _training_bar() as progress:
        training.adapt(
            checkpoint, train, out, held_out=held_out, recipe=recipe, options=options, say=say, progress=progress
        )
    if os.environ.get("RANK", "0") == "0":
        tell(f"wrote {out}")
    return None


@command(
    """
    examples:
      cappy verify cappy-bundle --checkpoint btan2/cappy-large
      cappy verify cappy-bundle --checkpoint ./my-checkpoint --precision int8 --pairs my-pairs.jsonl
    """
)
@click.argument("bundle", type=PATH, metavar="BUNDLE")
@click.option("--checkpoint", required=True, metavar="CHECKPOINT", help="a local folder, or a hub id")
@takes(VerifyOptions)
@click.option("--json", "as_json", is_flag=True, help="print the parity report as JSON")
def verify(bundle: Path, checkpoint: str, options: VerifyOptions, as_json: bool) -> None:
    """Prove a bundle's scores on this machine against its checkpoint."""
    with extra("cpu,export"):
        from cappy_export import pipeline
    parity = pipeline.verify(bundle, checkpoint, options, say=say)
    if as_json:
        print_json(parity)
    else:
        show(text.describe_parity(parity))


@contextlib.contextmanager
def _training_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a function for `adapt` that shows the loss and the time left."""
    loss: float | None = None
    with progress_bar("step") as show:

        def show_step(progress: Progress) -> None:
            nonlocal loss
            loss = progress.loss if loss is None else 0.95 * loss + 0.05 * progress.loss
            held_out = "".join(
                f", {name.replace('_', ' ')} {value:.3f}" for name, value in (progress.held_out or {}).items()
            )
            show(progress.step, progress.steps, f"loss {loss:.4f}{held_out}", begun=progress.step - 1)

        yield show_step
