"""Adapt a checkpoint: fine-tune it on pairs with labels, by Cappy's recipe (arXiv 2311.06720), no LLM needed.

Mean squared error of `logits[:, 0]` with AdamW, under a linear schedule with warm-up: `run.py` computes loss and steps.
The same options and files give the same steps, so a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from cappy_engine.errors import AdaptError, CheckpointError, OutputError
from cappy_engine.publish import check_apart_from_inputs, check_folder, check_space
from cappy_export.adaptation import state
from cappy_export.adaptation.examples import Examples, make_examples
from cappy_export.adaptation.launch import agree, finish, join, not_alone, together
from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.model_setup import pair_tokenizer
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.adaptation.run import Run
from cappy_export.adaptation.samples import examples_from_samples, read_samples
from cappy_export.adaptation.saving import ADAPTED
from cappy_export.adaptation.scanning import Counted, Scan, choose, count
from cappy_export.adaptation.shards import HeldShard, Shard, find_shards, paths_of, read_all
from cappy_export.checkpoints.checkpoint import Checkpoint, digest_of_files, float32_bytes, open_checkpoint, shape_model
from cappy_export.options import Say

Source = str | Path | Examples
"""Files of examples, or the examples themselves."""

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

    `train` is a file, a folder or a pattern of files with instruction, response and label (0 to 1), or a file with an
    LLM's samples (`options`). Files are read as they are needed; see `stream` for the order. Loss and grouped accuracy
    are measured on `held_out`, or on a part of `train` that is not trained on, at both ends and every `evaluate_every`
    steps. Every `save_every` steps, and with `keep_best` at each better evaluation, the state goes to `OUT.training`,
    from which `resume` goes on to the same weights. Returns the content of `OUT/training.json`.

    Several processes that a launcher started do this together, with the same steps and weights as one, but for the
    order of sums. Those beside the main one say nothing, and leave by SystemExit where the main one raises an error.

    A checkpoint of that name which an `adapt` made is replaced with `force`, once the new one is complete.

    Raises AdaptError, CheckpointError, and OutputError if `out` must not be written.
    """
    accelerator = join(recipe.mixed_precision, wait_seconds=options.wait_seconds)
    tell, show = (say, progress) if accelerator.is_main_process else (_keep_quiet, _keep_quiet)
    with not_alone(accelerator, lambda: state.way_on(state_of(Path(os.path.realpath(out))), force=options.force)):
        place, opened, shards, kept = together(
            accelerator, lambda: _prepare(accelerator, checkpoint, train, held_out, Path(out), recipe, options, tell)
        )
        settings = _settings(opened, recipe)
        facts = {"shards": [shard.name for shard in shards], "options": dataclasses.asdict(options)}
        agree(accelerator, {**settings, **facts, "versions": _versions()})
        scan = _scan(accelerator, shards, recipe.seed, options.held_out_fraction, kept)
        if scan.again:
            tell(f"note: {scan.again} held-out examples are in TRAIN, too; take them out, or the figures are too good")
        settings |= {
            "train": {"examples": scan.examples, "sha256": scan.digest},
            "held_out": {"examples": len(scan.held_out), "sha256": _digest(scan.held_out)},
        }
        agree(accelerator, settings)
        run = together(
            accelerator, lambda: Run(accelerator, opened, shards, scan, recipe, options, state_of(place), tell)
        )
        with contextlib.closing(run):
            run.start(settings)
            try:
                run.train(show)
                document = {**settings, "step": run.result, "log": run.history()}
                run.write(place, document, force=options.force)
            except (KeyboardInterrupt, SystemExit, OSError, OutputError, CheckpointError):  # a signal, a full disk ...
                tell(state.tell_what_is_kept(state_of(place), force=options.force))
                raise
            if accelerator.is_main_process:
                shutil.rmtree(state_of(place))
    return document


def state_of(place: Path) -> Path:
    """Name the folder that keeps the state of a training which writes to `place`.

    >>> state_of(Path("my-cappy"))
    PosixPath('my-cappy.training')
    """
    return place.with_name(place.name + state.ENDING)


def _prepare(
    accelerator: Accelerator, checkpoint: str | Path, train: Source, held_out: Source | None, out: Path, recipe: Recipe,
    options: AdaptOptions, say: Say,
) -> tuple[Path, Checkpoint, list[Shard], Examples | None]:  # fmt: skip
    """Find the place of `out`, the checkpoint, the shards and the held-out examples.

    The place is where `out` leads. The held-out examples are None unless they have a source of their own.
    """
    files = [path for source in (train, held_out) if isinstance(source, (str, Path)) for path in paths_of(source)]
    inputs = [Path(checkpoint), *files]
    if recipe.keep_best and held_out is None and not options.held_out_fraction:
        raise AdaptError(
            "--keep-best takes the least held-out loss, and nothing is held out; give a --held-out-fraction above 0, "
            "or a file with --held-out"
        )
    if not options.force:
        _check_not_beside(out)
    place = check_folder(out, ADAPTED, force=options.force, inputs=inputs)
    if state_of(place).exists():
        check_apart_from_inputs(state_of(place), inputs)
    state.look(state_of(place), force=options.force, resume=options.resume)
    opened = open_checkpoint(checkpoint, revision=options.revision, needs_head=False)
    check_folder(place, ADAPTED, force=options.force, inputs=[opened.folder])
    pair_tokenizer(opened, recipe.max_length)  # what it refuses is found before the examples are read
    if accelerator.is_main_process:  # it writes
        check_space(place, float32_bytes(opened, shape_model(opened)), "the checkpoint alone")
    shards = _shards(train, place, options, recipe.seed, say)
    once = None if held_out is None else _shards(held_out, place, options, recipe.seed, say, is_read_again=False)
    return place, opened, shards, None if once is None else _read_whole(once)


def _check_not_beside(out: Path) -> None:
    """Raise OutputError where both `out` and a saved state are there: --force alone would remove the state."""
    place = Path(os.path.realpath(out))
    if place.name and os.path.lexists(out) and state.states(state_of(place)):
        raise OutputError(
            f"{out} exists beside a training that was stopped; move it away and go on with --resume, or have it "
            "replaced with --resume --force (--force alone starts anew)"
        )


def _keep_quiet(_: object) -> None:
    """Say nothing: only the main process does."""


def _versions() -> dict[str, str]:
    """Name the versions that must be the same in every process."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")}


def _shards(
    source: Source, place: Path, options: AdaptOptions, seed: int, say: Say, *, is_read_again: bool = True
) -> list[Shard]:
    """Find the shards of `source`, in the form that `options` say.

    Examples in memory are one shard. `place`, where the result will be, must not be in the folder of the examples: the
    next time it would be read as examples.
    """
    if isinstance(source, Examples):
        return [HeldShard(source)]
    if options.from_samples:
        return [HeldShard(examples_from_samples(read_samples(source), negatives=options.negatives, seed=seed))]
    return find_shards(source, outputs=[place], say=say, is_read_again=is_read_again)


def _read_whole(shards: Sequence[Shard]) -> Examples:
    """Read examples to measure on, all into memory."""
    rows = list(read_all(shards))
    if not rows:
        raise AdaptError(f"{shards[0].name} holds no examples")
    return make_examples([row.pair for row in rows], [row.label for row in rows])


def _scan(accelerator: Accelerator, shards: Sequence[Shard], seed: int, fraction: float, kept: Examples | None) -> Scan:
    """Read all examples once, each process its part of the shards; `kept` are held out, or else a `fraction`."""
    source = shards[0].name if len(shards) == 1 else f"{shards[0].name} to {shards[-1].name}"
    found = Counted(frozenset(() if kept is None else kept.pairs))
    mine = range(accelerator.process_index, len(shards), accelerator.num_processes)
    finish(accelerator, count(shards, mine, seed=seed, found=found))
    parts = gather_object([found]) if accelerator.num_processes > 1 else [found]
    scan = together(accelerator, lambda: choose(parts, 0.0 if kept is not None else fraction, source=source))
    return scan if kept is None else dataclasses.replace(scan, held_out=kept)


def _settings(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Collect what decides the result, but for the examples and the machine."""
    return {
        "checkpoint": {"name": checkpoint.name, "sha256": digest_of_files(checkpoint.files)},
        "recipe": dataclasses.asdict(recipe),
    }


def _digest(examples: Examples) -> str:
    text = json.dumps([examples.pairs, [float(label) for label in examples.labels]])
    return hashlib.sha256(text.encode()).hexdigest()
