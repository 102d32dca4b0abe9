"""What a config says of the model's output is read as sentence-transformers and transformers read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.activation import find_activation
from cappy_export.checkpoints.checkpoint import open_checkpoint
from tests.support.checkpoints import copy, edit

IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
OLD_KEY = "sbert_ce_default_activation_function"


@pytest.mark.parametrize(
    ("config", "activation", "told_by"),
    [
        ({}, None, None),
        ({"sentence_transformers": {"version": "4.1.0"}}, None, None),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, "identity", "sentence_transformers.activation_fn"),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}},
            "sigmoid",
            "sentence_transformers.activation_fn",
        ),
        ({OLD_KEY: IDENTITY}, "identity", OLD_KEY),
        ({OLD_KEY: SIGMOID, "problem_type": "regression"}, "sigmoid", OLD_KEY),
        ({"problem_type": "regression"}, "identity", "problem_type"),
        ({"problem_type": "multi_label_classification"}, "sigmoid", "problem_type"),
    ],
    ids=str,
)
def test_the_first_key_that_says_something_counts(
    config: dict[str, Any], activation: str | None, told_by: str | None
) -> None:
    assert find_activation(config, Path("config.json")) == {"activation": activation, "told_by": told_by}


@pytest.mark.parametrize(
    "name", ["torch.nn.modules.activation.Tanh", "evil.Sigmoid", "torch.nnx.Sigmoid", "Sigmoid", 5]
)
def test_another_function_is_refused(checkpoint: Path, tmp_path: Path, name: Any) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(sentence_transformers={"activation_fn": name}))
    with pytest.raises(CheckpointError, match=r"activation_fn is .*; known are torch.nn.Identity and torch.nn.Sigmoid"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"sentence_transformers": {"activation_fn": IDENTITY}},
        {"sentence_transformers": {"activation_fn": SIGMOID}},
        {OLD_KEY: IDENTITY},
        {OLD_KEY: SIGMOID},
    ],
    ids=str,
)
def test_sentence_transformers_applies_what_is_found(checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(change))
    found = open_checkpoint(folder).score["activation"]
    applied = CrossEncoder(str(folder), device="cpu").activation_fn
    assert type(applied) is {"identity": torch.nn.Identity, "sigmoid": torch.nn.Sigmoid}[str(found)]
