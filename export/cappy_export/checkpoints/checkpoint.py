"""Open what training leaves, and load its model and tokenizer.

`hub.py` finds the files, `config.py` judges the configs, `weights.py` reads the weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cappy_engine.bundle import sha256_of
from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import (
    check_architecture,
    config_arguments,
    max_positions,
    read_config,
    read_tokenizer_config,
)
from cappy_export.checkpoints.hub import TOKENIZER_FILES, locate, weight_files
from cappy_export.checkpoints.weights import check_finite, check_keys, read_weights


@dataclass(frozen=True)
class Checkpoint:
    """Hold a checkpoint on disk, judged but not loaded. `weight_files` are in `folder`; `revision` is a hub commit."""

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    format: str
    weight_files: tuple[str, ...]

    @property
    def weight_paths(self) -> list[Path]:
        """Give the files that hold weights: all of `weight_files` but an index."""
        return [self.folder / name for name in self.weight_files if not name.endswith(".index.json")]

    @property
    def files(self) -> dict[str, str]:
        """Compute the sha256 of every file that the export reads, by name."""
        names = (
            "config.json",
            *self.weight_files,
            *(name for name in TOKENIZER_FILES if (self.folder / name).exists()),
        )
        return {name: sha256_of(self.folder / name) for name in names}


def digest_of_files(files: Mapping[str, str]) -> str:
    """Compute one sha256 for a set of files, given theirs by name.

    >>> digest_of_files({"config.json": "ab", "model.safetensors": "cd"})[:8]
    '9015b2f5'
    """
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(files.items())).encode()).hexdigest()


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find and judge a checkpoint: a local folder, or a hub id, downloaded at `revision`.

    >>> open_checkpoint("export/cappy_mini/checkpoint").format
    'safetensors'

    With HF_HUB_OFFLINE set, a hub id is one that was downloaded before. Weights are taken from safetensors, else .bin,
    else Flax's msgpack. Raises CheckpointError, which says what was found and what is needed.
    """
    found = locate(source, revision=revision)
    config = read_config(found.folder, found.name)
    check_architecture(config, found.name)
    format_, files = weight_files(found.folder, found.name)
    return Checkpoint(found.name, found.commit, found.folder, config, format_, files)


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the checkpoint's model in PyTorch: float32, eager attention, evaluation mode.

    >>> load_model(open_checkpoint("export/cappy_mini/checkpoint")).config.num_labels
    1

    Raises CheckpointError if the weights cannot be read safely, hold NaN or infinity, or do not fit the config. All
    missing, unexpected and misshapen keys are in one error.
    """
    try:
        config = CONFIG_MAPPING[checkpoint.config["model_type"]](**config_arguments(checkpoint.config))
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    except Exception as error:  # a config can be wrong in as many ways as there are architectures
        raise CheckpointError(f"config.json of {checkpoint.name} describes no model: {error!r}") from error
    try:
        weights = read_weights(checkpoint.weight_paths, checkpoint.format)
        check_keys(model.state_dict(), weights)
        check_finite(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name} ({checkpoint.format} weights): {error}") from error
    model.load_state_dict(weights, strict=False)  # copies into float32
    return model.eval()


def load_tokenizer(checkpoint: Checkpoint, *, max_length: int) -> PreTrainedTokenizerBase:
    """Load the checkpoint's fast tokenizer, with `model_max_length` set to at most `max_length`.

    >>> load_tokenizer(open_checkpoint("export/cappy_mini/checkpoint"), max_length=512).model_max_length
    512

    Raises CheckpointError if there is none, or it truncates or pads on the left.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if (checkpoint.folder / name).exists() and name != "tokenizer_config.json":
                shutil.copyfile(checkpoint.folder / name, Path(folder, name))
        Path(folder, "config.json").write_text(json.dumps(dict(checkpoint.config)))
        tokenizer_config = read_tokenizer_config(checkpoint.folder, checkpoint.name, checkpoint.config)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # as many kinds as there are tokenizers
            raise CheckpointError(f"{checkpoint.name} has no usable tokenizer: {error}") from error
    sides = (tokenizer.truncation_side, tokenizer.padding_side)
    if not tokenizer.is_fast or sides != ("right", "right") or tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} must be a fast one with a padding token that truncates and pads on "
            f"the right; found {type(tokenizer).__name__}, padding token {tokenizer.pad_token!r}, sides {sides}"
        )
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length, max_positions(checkpoint.config))
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if tokenizer.model_max_length < least:
        raise CheckpointError(
            f"max_length {tokenizer.model_max_length} leaves a pair no text; at least {least} is needed"
        )
    return tokenizer
