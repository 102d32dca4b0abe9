"""What a training tells and measures: rates, losses, its held-out examples, and how much it computes at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cappy_bench.make_checkpoint import make_family
from cappy_engine.cli.main import main
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.examples import grouped_accuracy
from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.recipe import AdaptOptions
from cappy_export.adaptation.training import adapt
from cappy_export.proof.reference import score_checkpoint
from tests.support.colours import RECIPE, StoppedError, colour_examples, weights_of, write_examples


def log_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the log: its steps, and its evaluations."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "gradient_norm" in entry]
    return steps, [entry for entry in entries if "gradient_norm" not in entry]


def test_the_log_has_the_schedule_and_the_means_of_its_steps(checkpoint: Path, tmp_path: Path) -> None:
    """The rate grows over a part of the steps, and falls to 0 with the last; means begin anew after each entry."""
    recipe = dataclasses.replace(RECIPE, max_steps=10, warmup_fraction=0.4, max_length=12)
    options = AdaptOptions(log_every=2, evaluate_every=5, peak_tflops=1e-3)
    seen: list[Progress] = []
    train, held_out = colour_examples(60).take(np.arange(96)), colour_examples(5)  # six whole steps in an epoch
    adapt(checkpoint, train, tmp_path / "out", recipe, options, held_out=held_out, progress=seen.append)
    rates = [recipe.learning_rate * share for share in [0, 1 / 4, 2 / 4, 3 / 4, *np.arange(6, 0, -1) / 6]]
    assert [each.learning_rate for each in seen] == pytest.approx(rates)
    losses = [each.loss for each in seen]
    steps, measured = log_of(tmp_path / "out")
    assert [entry["step"] for entry in steps] == [2, 4, 6, 8, 10]
    assert [entry["loss"] for entry in steps] == pytest.approx(np.mean(np.reshape(losses, (5, 2)), axis=1))
    assert [entry["truncated"] for entry in steps] == [32] * 5  # all have more than 12 tokens
    computing = sum(value.numel() for name, value in weights_of(checkpoint).items() if "_embeddings." not in name)
    shares = [6 * computing * entry["tokens_per_second"] / 1e9 for entry in steps]
    assert [entry["share_of_peak"] for entry in steps] == pytest.approx(shares, rel=0.01, abs=1e-4)
    assert min(shares) > 0.01
    assert [entry["step"] for entry in measured] == [0, 5, 10]
    assert [entry["loss"] for entry in measured[1:]] == pytest.approx([np.mean(losses[:5]), np.mean(losses[5:])])


def test_held_out_figures_are_those_of_the_checkpoint_that_is_written(checkpoint: Path, tmp_path: Path) -> None:
    """Measured without dropout, on texts that are cut where training cuts them, by the last step's weights."""
    held_out = colour_examples(12)
    recipe = dataclasses.replace(RECIPE, epochs=1, dropout=0.5, max_length=16)
    document = adapt(checkpoint, colour_examples(40), tmp_path / "out", recipe, held_out=held_out)
    scores = score_checkpoint(tmp_path / "out", held_out.pairs, max_length=16)
    last = document["log"][-1]
    assert last["held_out_loss"] == pytest.approx(np.square(scores - held_out.labels).mean(), rel=1e-4)
    assert last["held_out_accuracy"] == grouped_accuracy(scores, held_out)[0]
    assert document["log"][0]["constant_loss"] == pytest.approx(held_out.labels.var())


@pytest.mark.slow
def test_a_model_with_token_types_is_measured_and_trained_with_them(tmp_path: Path) -> None:
    bert, held_out = make_family(tmp_path / "bert", "ms-marco-MiniLM-L6-v2", is_tiny=True), colour_examples(12)
    document = adapt(bert, colour_examples(8), tmp_path / "out", RECIPE, held_out=held_out)
    for entry, folder in ((document["log"][0], bert), (document["log"][-1], tmp_path / "out")):
        scores = score_checkpoint(folder, held_out.pairs, max_length=64)
        assert entry["held_out_loss"] == pytest.approx(np.square(scores - held_out.labels).mean(), rel=1e-4)


def test_no_more_tokens_are_computed_at_once_than_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    computed: list[int] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding) and inputs[0].ndim == 2:
            computed.append(inputs[0].numel())

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        recipe = dataclasses.replace(RECIPE, max_steps=1, max_batch_tokens=100)
        adapt(checkpoint, colour_examples(40), tmp_path / "out", recipe, held_out=colour_examples(40))
    finally:
        hook.remove()
    assert 50 < max(computed) <= 100


def test_activations_that_are_computed_twice_are_not_kept(checkpoint: Path, tmp_path: Path) -> None:
    @contextmanager
    def kept_bytes(found: list[int]) -> Iterator[None]:
        def note(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield

    every: list[int] = []
    few: list[int] = []
    for found, is_saved in ((every, False), (few, True)):
        recipe = dataclasses.replace(RECIPE, max_steps=1, gradient_checkpointing=is_saved)
        with kept_bytes(found):
            adapt(checkpoint, colour_examples(20), tmp_path / str(is_saved), recipe)
    assert 0 < sum(few) < sum(every) / 2


def test_longer_gradients_are_cut_to_the_norm_that_was_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    """AdamW divides gradients by their own size, but for 1e-8: only much shorter ones change the step."""
    moved = []
    before = weights_of(checkpoint)
    for norm in (1.0, 1e-12):
        recipe = dataclasses.replace(RECIPE, max_steps=1, warmup_fraction=0.0, max_gradient_norm=norm)
        adapt(checkpoint, colour_examples(20), tmp_path / str(norm), recipe)
        after = weights_of(tmp_path / str(norm))
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in after))
    assert moved[0] > 1e-3
    assert moved[1] < 1e-6


def test_matrices_alone_decay(checkpoint: Path, tmp_path: Path) -> None:
    """Gradients are cut to nothing here, so that the decay is all that moves a weight."""
    step = dataclasses.replace(RECIPE, max_steps=1, warmup_fraction=0.0)
    recipe = dataclasses.replace(step, max_gradient_norm=1e-12, weight_decay=0.1)
    adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe)
    before = weights_of(checkpoint)
    for name, found in weights_of(tmp_path / "out").items():
        kept = 1 - recipe.learning_rate * 0.1 if found.ndim > 1 else 1
        assert torch.allclose(found, before[name] * kept, rtol=1e-6, atol=1e-6), name


def test_a_training_says_its_precision_window_and_length(checkpoint: Path, tmp_path: Path) -> None:
    told: list[str] = []
    recipe = dataclasses.replace(RECIPE, max_steps=1, window=32, max_length=12)
    adapt(checkpoint, colour_examples(40), tmp_path / "out", recipe, say=told.append)
    assert any("mixed precision no; 32 of the first 32 examples truncated to 12 tokens" in line for line in told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_a_training_without_the_precision_that_was_asked_for_does_not_begin(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(AdaptError, match="mixed precision fp16 needs a GPU"):
        adapt(checkpoint, colour_examples(8), tmp_path / "out", dataclasses.replace(RECIPE, mixed_precision="fp16"))


def test_a_training_that_stopped_before_its_first_state_logs_no_step_twice(checkpoint: Path, tmp_path: Path) -> None:
    recipe, options = dataclasses.replace(RECIPE, max_steps=4), AdaptOptions(log_every=1)

    def stop(progress: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        adapt(checkpoint, colour_examples(40), tmp_path / "out", recipe, options, progress=stop)
    adapt(checkpoint, colour_examples(40), tmp_path / "out", recipe, dataclasses.replace(options, resume=True))
    steps, measured = log_of(tmp_path / "out")
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert [entry["step"] for entry in measured] == [0, 4]


@pytest.mark.slow
def test_the_log_of_a_training_that_stopped_is_that_of_a_whole_one(checkpoint: Path, tmp_path: Path) -> None:
    """The state is saved between two lines of the log: their means are of the steps before it, too."""
    recipe = dataclasses.replace(RECIPE, max_steps=9)
    options = AdaptOptions(save_every=4, evaluate_every=3, log_every=3)

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            raise StoppedError

    adapt(checkpoint, colour_examples(60), tmp_path / "whole", recipe, options)
    with pytest.raises(StoppedError):
        adapt(checkpoint, colour_examples(60), tmp_path / "parts", recipe, options, progress=stop)
    resumed = dataclasses.replace(options, resume=True)
    adapt(checkpoint, colour_examples(60), tmp_path / "parts", recipe, resumed)
    logs = [
        [{**entry, "tokens_per_second": 0, "seconds": 0} for entries in log_of(tmp_path / name) for entry in entries]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_the_command_measures_on_the_held_out_file_and_trains_on_all_of_the_other(
    checkpoint: Path, tmp_path: Path
) -> None:
    train = write_examples(tmp_path / "train.jsonl", colour_examples(20))
    held_out = write_examples(tmp_path / "held-out.jsonl", colour_examples(5))
    words = ["adapt", str(checkpoint), str(train), str(tmp_path / "out"), "--held-out", str(held_out)]
    assert main([*words, "--max-steps", "1"]) == 0
    document = json.loads((tmp_path / "out" / "training.json").read_text())
    counts = document["train"]["examples"], document["held_out"]["examples"]
    assert counts == (len(colour_examples(20)), len(colour_examples(5)))
