"""Find, judge and load a generative checkpoint: a local folder or a hub id, seq2seq (T5 and its kin) or causal.

Its config files are read here before transformers sees them, and nothing of the checkpoint is run; of
generation_config.json only the ids of special tokens are taken. Where files lie is `cappy_export.checkpoints.hub`'s.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from cappy_engine.errors import CheckpointError, DeviceUnavailable, InstallationError, install_hint
from cappy_engine.storage import sha256_of
from cappy_export.checkpoints.checkpoint import digest_of_files
from cappy_export.checkpoints.config import read_json, refuse_code
from cappy_export.checkpoints.hub import (
    ADAPTER,
    CHAT_TEMPLATE,
    TOKENIZER_FILES,
    download,
    locate,
    refuse_adapter,
    refuse_pointers,
    weight_files,
)
from cappy_export.checkpoints.tokenizer_config import read_tokenizer_config

log = logging.getLogger(__name__)

CONFIG_FILES = (
    "config.json", "generation_config.json", ADAPTER, CHAT_TEMPLATE, "tokenizer.model", *TOKENIZER_FILES
)  # fmt: skip
WEIGHT_FORMATS = ("safetensors", "bin")
"""Formats in order of preference."""

SPECIAL_IDS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""All that is taken of generation_config.json: `forced_eos_token_id` would make a cut response look complete."""


@dataclass(frozen=True)
class LLMCheckpoint:
    """A generative checkpoint on disk, judged but not loaded.

    `commit` is the hub's (None: a local folder); `weight_files` are in `folder`.
    """

    name: str
    commit: str | None
    folder: Path
    config: Mapping[str, Any]
    is_seq2seq: bool
    format: str
    weight_files: tuple[str, ...]

    def identity(self) -> dict[str, str]:
        """Tell the checkpoint from others: the hub's id and commit, or a folder's name and the sha256 of its files."""
        if self.commit is not None:
            return {"model": self.name, "commit": self.commit}
        present = [name for name in CONFIG_FILES if (self.folder / name).exists()]
        files = {name: sha256_of(self.folder / name) for name in sorted({*present, *self.weight_files})}
        return {"model": self.name, "sha256": digest_of_files(files)}


def open_llm_checkpoint(source: str | Path, *, revision: str | None = None) -> LLMCheckpoint:
    """Find and judge a generative checkpoint: a local folder, or a hub id, downloaded at `revision`.

        >>> open_llm_checkpoint("google/flan-t5-small").is_seq2seq
        True

    Weights are downloaded after the config was judged. With HF_HUB_OFFLINE set, a hub id is one that was downloaded
    before. Raises CheckpointError.
    """
    found = locate(source, revision=revision, files=CONFIG_FILES, formats=())
    config, is_seq2seq = _judge(found.folder, found.name)
    if found.commit is not None:
        found = download(found.name, revision=found.commit, formats=WEIGHT_FORMATS)
    format_, files = weight_files(found.folder, found.name, formats=WEIGHT_FORMATS)
    refuse_pointers(found.folder, found.name, (*files, *CONFIG_FILES))
    return LLMCheckpoint(found.name, found.commit, found.folder, config, is_seq2seq, format_, files)


def special_ids(checkpoint: LLMCheckpoint, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Look up SPECIAL_IDS in generation_config.json, else config.json, else the tokenizer.

        >>> checkpoint = open_llm_checkpoint("google/flan-t5-small")
        >>> special_ids(checkpoint, load_llm_tokenizer(checkpoint))
        {'eos_token_id': 1, 'pad_token_id': 0, 'decoder_start_token_id': 0}

    There is always a padding id. Raises CheckpointError.
    """
    path = checkpoint.folder / "generation_config.json"
    shipped = read_json(path) if path.exists() else {}
    default = _default_config(checkpoint)
    found: dict[str, Any] = {}
    for name in SPECIAL_IDS:
        by_config = checkpoint.config.get(name, getattr(default, name, None))
        by_tokenizer = getattr(tokenizer, name, None)
        order = (by_tokenizer, shipped.get(name)) if name == "pad_token_id" else (shipped.get(name), by_config)
        found[name] = next((value for value in (*order, by_config, by_tokenizer) if value is not None), None)
    ends = found["eos_token_id"]
    if found["pad_token_id"] is None:  # padding is masked, so that any token will do
        found["pad_token_id"] = ends[0] if isinstance(ends, list) else ends if ends is not None else 0
    return {name: value for name, value in found.items() if value is not None}


def load_llm_tokenizer(checkpoint: LLMCheckpoint) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, which cuts on the right.

        >>> load_llm_tokenizer(open_llm_checkpoint("google/flan-t5-small")).eos_token
        '</s>'

    Raises CheckpointError if it has none that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as many kinds as there are tokenizers
        raise CheckpointError(f"{checkpoint.name} has no usable tokenizer: {error}") from error
    tokenizer.truncation_side = "right"
    return tokenizer


def _default_config(checkpoint: LLMCheckpoint) -> PretrainedConfig:
    model_type = checkpoint.config["model_type"]
    try:
        return CONFIG_MAPPING[model_type]()
    except ValueError as error:  # of "encoder-decoder" and others that are put together from two models
        raise CheckpointError(
            f"the model type {model_type!r} of {checkpoint.name} describes no model that could be sampled from: {error}"
        ) from error


def load_llm_config(checkpoint: LLMCheckpoint) -> PretrainedConfig:
    """Load the checkpoint's config.

        >>> load_llm_config(open_llm_checkpoint("google/flan-t5-small")).model_type
        't5'

    Raises CheckpointError if there is something wrong with it.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config can be wrong in as many ways as there are architectures
        raise CheckpointError(f"config.json of {checkpoint.name} describes no model: {error!r}") from error


def load_llm(
    checkpoint: LLMCheckpoint, config: PretrainedConfig, *, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Load the model in evaluation mode, on `device` ("cpu" or "cuda"); several GPUs share it.

        >>> checkpoint = open_llm_checkpoint("google/flan-t5-small")
        >>> load_llm(checkpoint, load_llm_config(checkpoint), device="cpu", dtype=torch.float32).training
        False

    Raises CheckpointError if the weights do not fit the config, and DeviceUnavailable if the GPUs cannot hold it.
    """
    is_shared = device == "cuda" and torch.cuda.device_count() > 1
    if is_shared and importlib.util.find_spec("accelerate") is None:
        raise InstallationError(
            f"several GPUs share a model by the package 'accelerate'; {install_hint('cpu,export,train')}"
        )
    auto = AutoModelForSeq2SeqLM if checkpoint.is_seq2seq else AutoModelForCausalLM
    classes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if checkpoint.is_seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        model, loaded = auto.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa" if classes[type(config)]._supports_sdpa else "eager",
            generation_config=GenerationConfig(),  # given, so that neither the checkpoint's nor its code is looked for
            use_safetensors=checkpoint.format == "safetensors",
            weights_only=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **({"device_map": "auto"} if is_shared else {}),
        )
    except ImportError as error:
        raise InstallationError(f"{checkpoint.name} needs a package that is missing: {error}") from error
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(f"{checkpoint.name} does not fit into the memory of {device}: {error}") from error
    except Exception as error:  # weights can be wrong in as many ways as there are architectures
        raise CheckpointError(f"{checkpoint.name} cannot be loaded: {error}") from error
    _check_loaded(checkpoint, loaded)
    placed = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if placed & {"cpu", "disk"}:
        raise DeviceUnavailable(f"the GPUs cannot hold {checkpoint.name}: parts of it were put on {sorted(placed)}")
    try:
        return (model if is_shared else model.to(device)).eval()
    except torch.OutOfMemoryError as error:
        raise DeviceUnavailable(f"{checkpoint.name} does not fit into the memory of {device}: {error}") from error


def _check_loaded(checkpoint: LLMCheckpoint, loaded: Mapping[str, Any]) -> None:
    """Refuse weights with gaps, which transformers would fill with random numbers."""
    missing, misshapen = sorted(loaded["missing_keys"]), sorted(map(str, loaded["mismatched_keys"]))
    if missing or misshapen:
        shown = ", ".join([*missing, *misshapen][:8])
        raise CheckpointError(
            f"the weights of {checkpoint.name} do not fit config.json: {len(missing)} missing, {len(misshapen)} of "
            f"another shape, such as {shown}"
        )
    if loaded["unexpected_keys"]:
        log.warning(
            "%s has weights that its model does not use: %s", checkpoint.name, sorted(loaded["unexpected_keys"])
        )


def _judge(folder: Path, name: str) -> tuple[dict[str, Any], bool]:
    """Return (config, is_seq2seq); refuse configs that could fetch or run code, and models that do not generate."""
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / file).exists():
            refuse_code(read_json(folder / file), folder / file)
    refuse_adapter(folder, name)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{name} is not a checkpoint: it has no config.json")
    config = read_json(folder / "config.json")
    read_tokenizer_config(folder, name, config)  # for its checks
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{name} is of the model type {model_type!r}, which this transformers does not know")
    architectures = [str(each) for each in config.get("architectures") or []]
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return config, not (is_causal and any(each.endswith("ForCausalLM") for each in architectures))
    if not is_causal:
        raise CheckpointError(f"{name} generates no text: {', '.join(architectures) or 'model type ' + model_type}")
    return config, False
