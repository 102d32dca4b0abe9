"""What a config says of the model's output is read as sentence-transformers and transformers read it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.activation import find_activation
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.config import bundle_config
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


def saved(checkpoint: Path, folder: Path, **options: Any) -> Path:
    """The checkpoint as sentence-transformers from 5.4 on saves it: the activation is not in config.json."""
    CrossEncoder(str(checkpoint), device="cpu", **options).save_pretrained(str(folder))
    assert "activation" not in (folder / "config.json").read_text()
    return folder


@pytest.mark.parametrize("name", ["identity", "sigmoid"])
def test_what_sentence_transformers_keeps_beside_the_config_is_found(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    function = {"identity": torch.nn.Identity(), "sigmoid": torch.nn.Sigmoid()}[name]
    folder = saved(checkpoint, tmp_path / "saved", activation_fn=function)
    other = SIGMOID if name == "identity" else IDENTITY
    edit(folder / "config.json", lambda config: config.update(sentence_transformers={"activation_fn": other}))
    assert type(CrossEncoder(str(folder), device="cpu").activation_fn) is type(function)
    opened = open_checkpoint(folder)
    assert opened.score == {"activation": name, "told_by": "config_sentence_transformers.activation_fn"}
    assert {"modules.json", "config_sentence_transformers.json"} <= set(opened.files)


def test_another_function_beside_the_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = saved(checkpoint, tmp_path / "saved", activation_fn=torch.nn.Tanh())
    with pytest.raises(CheckpointError, match=r"transformers.json: activation_fn is .*Tanh'; known are torch.nn.Ident"):
        open_checkpoint(folder)


def test_a_prompt_that_sentence_transformers_puts_before_each_pair_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": {"query": "query: ", "none": ""}}
    folder = saved(checkpoint, tmp_path / "saved", **options, default_prompt_name="query")
    with pytest.raises(CheckpointError, match=r"puts the prompt 'query: ' before each instruction"):
        open_checkpoint(folder)
    for change in ({"default_prompt_name": "none"}, {"default_prompt_name": None}):
        edit(folder / "config_sentence_transformers.json", partial(dict.update, **change))
        assert open_checkpoint(folder).score["activation"] == "sigmoid"


def test_a_head_in_modules_of_sentence_transformers_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = saved(checkpoint, tmp_path / "saved")
    modules = json.loads((folder / "modules.json").read_text())
    for number, kind in enumerate(("Pooling", "Dense"), start=1):
        modules.append({"idx": number, "name": str(number), "path": f"{number}_{kind}", "type": f"x.y.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"score comes from x.y.Pooling, x.y.Dense behind the model"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, needs_head=False).has_head
    edit(folder / "config_sentence_transformers.json", lambda config: config.update(model_type="SparseEncoder"))
    assert open_checkpoint(folder).score["told_by"] is None  # CrossEncoder reads config.json alone then


def test_a_bundles_config_says_that_scores_are_raw_whatever_the_checkpoints_said(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(problem_type="single_label_classification"))
    assert bundle_config(open_checkpoint(folder).config)["problem_type"] == "regression"
