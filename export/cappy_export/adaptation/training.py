"""Adapt a checkpoint: fine-tune it on pairs with labels, by Cappy's recipe (arXiv 2311.06720), no LLM needed.

Mean squared error of `logits[:, 0]` with AdamW, under a linear schedule with warm-up. The same options and files give
the same steps, so a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cappy_engine.publish import check_apart, check_folder
from cappy_export.adaptation.examples import Examples, hold_out, read_examples
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.adaptation.run import ADAPTED, Progress, Run
from cappy_export.adaptation.samples import examples_from_samples, read_samples
from cappy_export.checkpoints.checkpoint import Checkpoint, digest_of_files, open_checkpoint
from cappy_export.options import Say

Source = str | Path | Examples
"""A file of examples, or the examples themselves."""

log = logging.getLogger(__name__)


def adapt(
    checkpoint: str | Path,
    train: Source,
    out: str | Path,
    recipe: Recipe = Recipe(),
    options: AdaptOptions = AdaptOptions(),
    *,
    held_out: Source | None = None,
    say: Say = log.info,
    progress: Callable[[Progress], object] = lambda progress: None,
) -> dict[str, Any]:
    """Fine-tune `checkpoint` (a folder or hub id) on `train`; write the result to the folder `out`.

    >>> adapt("export/cappy_mini/checkpoint", "docs/examples/train.jsonl", "my-cappy", Recipe(epochs=3))

    `train` is JSON Lines with instruction, response and label (0 to 1), or with an LLM's samples (`options`). Loss and
    grouped accuracy are measured on `held_out`, or on a part of `train` that is not trained on, at both ends and every
    `evaluate_every` steps. Every `save_every` steps the whole state is written to `OUT.training`. With `resume` a
    training that was stopped goes on from there, to the same weights. Returns the content of `OUT/training.json`.

    A checkpoint of that name which an `adapt` made is replaced with `force`, once the new one is complete.

    Raises AdaptError, CheckpointError, and OutputError if `out` must not be written.
    """
    inputs = [Path(source) for source in (checkpoint, train, held_out) if isinstance(source, (str, Path))]
    place = check_folder(Path(out), ADAPTED, force=options.force, inputs=inputs)
    state = place.with_name(place.name + ".training")
    if state.exists():
        check_apart(state, inputs)
    opened = open_checkpoint(checkpoint, revision=options.revision)
    check_folder(place, ADAPTED, force=options.force, inputs=[opened.folder])
    examples = _read(train, options, recipe.seed)
    if held_out is None:
        training, kept = hold_out(examples, options.held_out_fraction, seed=recipe.seed)
    else:
        training, kept = examples, _read(held_out, options, recipe.seed)
    settings = _settings(opened, training, kept, recipe)
    run = Run(opened, training, kept, recipe, state, say)
    with contextlib.closing(run):
        run.start(settings, options)
        run.train(options, progress)
        document = {**settings, "log": run.history()}
        run.write(place, document, force=options.force)
    return document


def _read(source: Source, options: AdaptOptions, seed: int) -> Examples:
    """Read examples in the form that `options` say, unless `source` is the examples."""
    if isinstance(source, Examples):
        return source
    if options.from_samples:
        return examples_from_samples(read_samples(source), negatives=options.negatives, seed=seed)
    return read_examples(source)


def _settings(checkpoint: Checkpoint, training: Examples, held_out: Examples, recipe: Recipe) -> dict[str, Any]:
    """Collect all that decides the result, but for the machine."""
    return {
        "checkpoint": {"name": checkpoint.name, "sha256": digest_of_files(checkpoint.files)},
        "train": {"examples": len(training), "sha256": _digest(training)},
        "held_out": {"examples": len(held_out), "sha256": _digest(held_out)},
        "recipe": dataclasses.asdict(recipe),
    }


def _digest(examples: Examples) -> str:
    text = json.dumps([examples.pairs, [float(label) for label in examples.labels]])
    return hashlib.sha256(text.encode()).hexdigest()
