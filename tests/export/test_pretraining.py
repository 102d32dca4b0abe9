"""From an encoder to a scorer: a new head, the recipe's numbers, less memory, and a disk that is full."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from cappy_engine.errors import AdaptError, CheckpointError
from cappy_export.adaptation import state
from cappy_export.adaptation.recipe import RECIPES, AdaptOptions, Recipe
from cappy_export.adaptation.training import adapt
from cappy_export.checkpoints.checkpoint import load_with_head, open_checkpoint
from cappy_export.cli import adapt as command
from tests.support.checkpoints import copy
from tests.support.colours import RECIPE, colour_examples, weights_of

CLASSES = {"encoder": AutoModel, "masked": AutoModelForMaskedLM, "labels": AutoModelForSequenceClassification}


def without_head(checkpoint: Path, folder: Path, kind: str) -> Path:
    """Write the tiny checkpoint's encoder as another architecture has it, with random weights."""
    copy(checkpoint, folder, weights=None)
    config = AutoConfig.from_pretrained(checkpoint, num_labels=3, problem_type=None)
    torch.manual_seed(1)
    CLASSES[kind].from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_an_encoder_gets_a_head_from_the_seed_and_keeps_its_weights(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    folder = without_head(checkpoint, tmp_path / kind, kind)
    with pytest.raises(CheckpointError, match=r"has no regression head|has 3 labels"):
        open_checkpoint(folder)
    opened = open_checkpoint(folder, needs_head=False)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, new = load_with_head(opened, is_quiet=True)
        found.append(model.state_dict())
        assert "classifier.out_proj.weight" in new
        assert all(name.startswith("classifier.") for name in new)
    same, other = ([torch.equal(found[0][name], each[name]) for name in new] for each in found[1:])
    assert all(same)
    assert not all(other)
    saved = {name.removeprefix("roberta."): value for name, value in weights_of(folder).items()}
    body = {name.removeprefix("roberta."): value for name, value in found[0].items() if name.startswith("roberta.")}
    assert body
    assert all(torch.equal(value, saved[name]) for name, value in body.items())


def test_an_encoder_without_a_pooler_gets_one_with_its_head(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    _, new = load_with_head(open_checkpoint(tmp_path / "bert", needs_head=False), is_quiet=True)
    assert new == [f"{layer}.{part}" for layer in ("bert.pooler.dense", "classifier") for part in ("bias", "weight")]


def test_an_encoder_becomes_a_checkpoint_that_can_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    told: list[str] = []
    folder = without_head(checkpoint, tmp_path / "encoder", "masked")
    adapt(folder, colour_examples(20), tmp_path / "out", dataclasses.replace(RECIPE, max_steps=1), say=told.append)
    assert any("has no head for one score: 4 weights begin at random from seed 0" in line for line in told)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.has_head
    assert load_with_head(opened)[1] == []


def test_a_recipes_numbers_are_defaults_that_options_go_before() -> None:
    def parsed(*words: str) -> tuple[Recipe, AdaptOptions]:
        with command.make_context("adapt", ["checkpoint", "train.jsonl", "out", *words]) as context:
            return context.params["recipe"], context.params["options"]

    assert parsed() == (Recipe(), AdaptOptions())
    assert parsed("--recipe", "pretraining") == RECIPES["pretraining"]
    recipe, options = parsed("--batch-size", "64", "--recipe", "pretraining", "--save-every", "5")
    assert (recipe.batch_size, recipe.learning_rate, options.save_every, options.evaluate_every) == (64, 1e-5, 5, 1000)


def test_activations_that_are_computed_twice_give_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    for name, is_saved in (("kept", False), ("twice", True)):
        recipe = dataclasses.replace(RECIPE, max_steps=3, dropout=0.1, gradient_checkpointing=is_saved)
        adapt(checkpoint, colour_examples(20), tmp_path / name, recipe)
    kept, twice = (weights_of(tmp_path / name) for name in ("kept", "twice"))
    assert all(torch.equal(value, twice[name]) for name, value in kept.items())


@pytest.mark.slow
def test_a_full_disk_leaves_the_state_before_and_training_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    recipe, options = dataclasses.replace(RECIPE, max_steps=10), AdaptOptions(save_every=4, log_every=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Any) -> None:
        if progress.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(AdaptError, match=r"state of step 8 cannot be saved .*; the state of step 4 is kept: make"):
            adapt(checkpoint, colour_examples(60), tmp_path / "out", recipe, options, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "out.training"
    assert state.states(folder).keys() == {4}
    assert sorted(path.name for path in folder.iterdir()) == ["log.jsonl", "settings.json", "step-4"]
    adapt(checkpoint, colour_examples(60), tmp_path / "out", recipe, dataclasses.replace(options, resume=True))
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, *range(1, 11), 10]
