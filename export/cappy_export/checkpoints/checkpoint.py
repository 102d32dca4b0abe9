"""What training leaves, found and read; its configs are judged in `config.py`, its weights read in `weights.py`."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cappy_engine.bundle import sha256_of
from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import (
    check_architecture,
    config_arguments,
    max_positions,
    read_config,
    read_json,
    read_tokenizer_config,
)
from cappy_export.checkpoints.weights import check_finite, check_keys, read_weights

log = logging.getLogger(__name__)

WEIGHT_FILES = {
    "safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    "msgpack": ("flax_model.msgpack",),
}
"""Formats in order of preference, with the files that tell them."""

TOKENIZER_FILES = tuple(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt
    sentencepiece.bpe.model spiece.model spm.model bpe.codes""".split()
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, judged but not loaded. `weight_files` are in `folder`; `revision` is a hub commit."""

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    format: str
    weight_files: tuple[str, ...]

    @property
    def weight_paths(self) -> list[Path]:
        """The files that hold weights: all of `weight_files` but an index."""
        return [self.folder / name for name in self.weight_files if not name.endswith(".index.json")]

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of every file that the export reads, by name."""
        names = (
            "config.json",
            *self.weight_files,
            *(name for name in TOKENIZER_FILES if (self.folder / name).exists()),
        )
        return {name: sha256_of(self.folder / name) for name in names}


def digest_of_files(files: Mapping[str, str]) -> str:
    """One sha256 for a set of files, given theirs by name."""
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(files.items())).encode()).hexdigest()


def open_checkpoint(source: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find and judge a checkpoint: a local folder, or a hub id, downloaded at `revision`.

    With HF_HUB_OFFLINE set, a hub id is one that was downloaded before; its commit is the one in the hub's cache.
    Weights are taken from safetensors, else .bin, else Flax's msgpack. Raises CheckpointError that says what was found
    and what is needed.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{source} is a local folder; --revision is for hub ids")
        return _judge(folder.resolve().name, None, folder)
    if folder.exists() or str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source} is no checkpoint: {'not a folder' if folder.exists() else 'it does not exist'}"
        )
    downloaded, commit = _download(str(source), revision)
    return _judge(str(source), commit, downloaded)


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The checkpoint's model in PyTorch: float32, eager attention, evaluation mode.

    Raises CheckpointError if the weights cannot be read safely, hold NaN or infinity, or do not fit the config; all
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
    """The checkpoint's fast tokenizer, with `model_max_length` set to at most `max_length`.

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


def _judge(name: str, revision: str | None, folder: Path) -> Checkpoint:
    config = read_config(folder, name)
    check_architecture(config, name)
    format_, files = _weight_files(folder, name)
    return Checkpoint(name, revision, folder, config, format_, files)


def _download(source: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a hub repository with what is needed of it, and its commit; offline, as it was downloaded before.

    Downloads by the revision's name, not by its commit: only then the cache keeps what offline mode looks up.
    """
    commit, patterns = None, None
    try:
        if not constants.HF_HUB_OFFLINE:
            commit, patterns = _needed_files(source, revision)
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(
                f"{source}{f' at revision {revision}' if revision else ''} is not downloaded, and HF_HUB_OFFLINE is "
                "set; unset it, download it first, or set HF_HOME to where it was downloaded"
            ) from error
        raise CheckpointError(
            f"{source} is neither a local folder nor a hub checkpoint that can be downloaded: {error}"
        ) from error
    if commit not in (None, folder.name):  # the hub went away after it was asked, and an older download is there
        raise CheckpointError(f"{source} is at commit {commit}, but only {folder.name} is downloaded; run it again")
    return folder, folder.name


def _needed_files(source: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The commit of a hub repository, and patterns for what is needed of it: one format of weights, no code."""
    info = HfApi().model_info(source, revision=revision)
    listed = [entry.rfilename for entry in info.siblings or []]
    patterns = ["config.json", *TOKENIZER_FILES]
    for format_, names in WEIGHT_FILES.items():
        if any(name in listed for name in names):
            stem, ending = names[0].rsplit(".", 1)
            patterns += [*names, f"{stem}-*-of-*.{ending}"]
            log.info("downloading %s (%s weights)", source, format_)
            break
    return info.sha, patterns


def _weight_files(folder: Path, name: str) -> tuple[str, tuple[str, ...]]:
    for format_, names in WEIGHT_FILES.items():
        for candidate in names:
            if (folder / candidate).exists():
                return format_, (candidate, *_shards(folder / candidate))
    wanted = ", ".join(names[0] for names in WEIGHT_FILES.values())
    found = ", ".join(sorted(entry.name for entry in folder.iterdir()))
    raise CheckpointError(f"{name} has no weights: needed is one of {wanted} (or shards with an index); found {found}")


def _shards(index: Path) -> tuple[str, ...]:
    if not index.name.endswith(".index.json"):
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not a file beside it")
    return tuple(shards)
