"""What training leaves, found, judged and read: nothing in a checkpoint can make this code run or fetch anything.

`config.json` is parsed here and reduced to an allow-list before transformers sees it (transformers 4.56 to 5.2 fetch
and run code for some of its keys, CVE-2026-4372); weights come from safetensors, from a pickle restricted to tensors,
or from Flax's msgpack.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from cappy_engine.bundle import sha256_of
from cappy_engine.errors import CheckpointError
from cappy_export.weights import check_finite, check_keys, read_weights

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

COMMON_KEYS = frozenset(
    """architectures model_type id2label label2id num_labels problem_type pad_token_id bos_token_id eos_token_id
    sep_token_id tokenizer_class is_decoder is_encoder_decoder add_cross_attention chunk_size_feed_forward""".split()
)
"""Keys of config.json that any model has; those of one architecture are the arguments of its config class."""

IGNORED_KEYS = frozenset(
    """transformers_version torch_dtype dtype _name_or_path name_or_path use_cache gradient_checkpointing
    finetuning_task output_past sentence_transformers task_specific_params return_dict output_attentions
    output_hidden_states torchscript tie_word_embeddings language""".split()
)
"""Keys that are common and say nothing about the scores."""

TOKENIZER_KEYS = frozenset(
    """tokenizer_class model_max_length added_tokens_decoder additional_special_tokens extra_special_tokens
    add_prefix_space trim_offsets errors do_lower_case strip_accents tokenize_chinese_chars do_basic_tokenize
    never_split
    clean_up_tokenization_spaces padding_side truncation_side model_input_names legacy sp_model_kwargs keep_accents
    remove_space split_by_punct do_lower vocab_type""".split()
)
"""Keys of tokenizer_config.json that say how texts become tokens; special tokens (`..._token`) are kept as well."""

COUNTS_FROM_PADDING = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm", "data2vec-text", "ibert"}
)
REFUSED_PARTS = ("auto_map", "attn_implementation", "kernel", "quantization", "custom_", "trust_remote", "_hub")


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
        config = CONFIG_MAPPING[checkpoint.config["model_type"]](**_config_arguments(checkpoint.config))
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
        tokenizer_config = _tokenizer_config(checkpoint)
        _check_tokenizer_class(checkpoint.name, tokenizer_config, checkpoint.config)
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


def max_positions(config: Mapping[str, Any]) -> int:
    """The longest pair in tokens that the model has positions for.

    RoBERTa and its kin number positions from the padding id up, which takes `pad_token_id + 1` of them away.
    """
    resolved = CONFIG_MAPPING[config["model_type"]](**_config_arguments(config))
    positions = int(resolved.max_position_embeddings)
    return positions - int(resolved.pad_token_id) - 1 if config["model_type"] in COUNTS_FROM_PADDING else positions


def bundle_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`config.json` for a bundle: what transformers writes for this model, and what makes other tools give raw scores.

    Without `problem_type`, the transformers pipeline puts a sigmoid on the score; without `activation_fn`,
    sentence-transformers and vLLM do.
    """
    arguments = _config_arguments(checkpoint.config)
    config: dict[str, Any] = CONFIG_MAPPING[checkpoint.config["model_type"]](**arguments).to_diff_dict()
    config["problem_type"] = "regression"
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    return config


def _judge(name: str, revision: str | None, folder: Path) -> Checkpoint:
    config = _read_config(folder, name)
    _check_architecture(config, name)
    format_, files = _weight_files(folder, name)
    return Checkpoint(name, revision, folder, config, format_, files)


def _download(source: str, revision: str | None) -> tuple[Path, str]:
    """Fetch only what is needed of a hub repository: one format of weights, no code."""
    try:
        info = HfApi().model_info(source, revision=revision)
        listed = [entry.rfilename for entry in info.siblings or []]
        patterns = ["config.json", *TOKENIZER_FILES]
        for format_, names in WEIGHT_FILES.items():
            if any(name in listed for name in names):
                stem, ending = names[0].rsplit(".", 1)
                patterns += [*names, f"{stem}-*-of-*.{ending}"]
                log.info("downloading %s (%s weights)", source, format_)
                break
        folder = snapshot_download(source, revision=info.sha, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{source} is neither a local folder nor a hub checkpoint that can be downloaded: {error}"
        ) from error
    return Path(folder), str(info.sha)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """`config.json`, reduced to the keys that its architecture knows; refuses what could fetch or run code."""
    path = folder / "config.json"
    if not path.exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{name} is no checkpoint: it has no config.json; found {found}")
    config = _read_json(path)
    refuse_code(config, path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{path} names the model type {model_type!r}, which this transformers does not know")
    known = COMMON_KEYS | set(inspect.signature(CONFIG_MAPPING[model_type].__init__).parameters) - {"self", "kwargs"}
    dropped = sorted(set(config) - known - IGNORED_KEYS)
    if dropped:
        log.warning("%s: ignoring keys that %s does not know: %s", path, model_type, _listed(dropped))
    kept = {key: value for key, value in config.items() if key in known - IGNORED_KEYS}
    for key, value in kept.items():
        _check_value(path, key, value)
    return kept


def refuse_code(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for keys, at any depth, that make transformers fetch or run code."""
    for key, value in config.items():
        if any(part in key for part in REFUSED_PARTS) and not isinstance(value, (int, float, type(None))):
            raise CheckpointError(
                f"{path} has {key!r}: {value!r}, which can make transformers fetch or run code; remove the key"
            )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                refuse_code(child, path)


def _check_value(path: Path, key: str, value: Any) -> None:
    scalar = (str, int, float, bool, type(None))
    is_list = isinstance(value, list) and all(isinstance(item, scalar) for item in value)
    is_map = (
        isinstance(value, dict)
        and key in ("id2label", "label2id")
        and all(isinstance(v, scalar) for v in value.values())
    )
    if not (isinstance(value, scalar) or is_list or is_map):
        raise CheckpointError(f"{path}: {key!r} must be a number, a string or a list of them, found {value!r}")


def _config_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("model_type", "label2id", "id2label")} | {
        "num_labels": 1
    }


def _check_architecture(config: Mapping[str, Any], name: str) -> None:
    """Only an encoder with a sequence-classification head and one label gives one score for a pair."""
    model_type, architectures = config["model_type"], config.get("architectures") or []
    found = f"{', '.join(map(str, architectures)) or 'no architecture'} (model type {model_type})"
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.get("is_decoder") or config.get("is_encoder_decoder") or not is_encoder:
        raise CheckpointError(f"{name} is a generative model, or no text encoder: {found}; needed is a text encoder")
    if len(architectures) != 1 or not str(architectures[0]).endswith("ForSequenceClassification"):
        raise CheckpointError(f"{name} has no regression head: {found}; needed is a model ...ForSequenceClassification")
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise CheckpointError(f"{name} has {count} labels; needed is one (the score): num_labels 1 in config.json")


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
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard!r}, which is not a file beside it")
    return tuple(shards)


def _tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    config = _read_json(path)
    refuse_code(config, path)
    return {key: value for key, value in config.items() if key in TOKENIZER_KEYS or key.endswith("_token")}


def _check_tokenizer_class(name: str, *configs: Mapping[str, Any]) -> None:
    """transformers would take any of its classes by this name; let it be a tokenizer."""
    known = {str(entry) for pair in TOKENIZER_MAPPING_NAMES.values() for entry in pair} | {"PreTrainedTokenizerFast"}
    for config in configs:
        found = config.get("tokenizer_class")
        if found is not None and found not in known and f"{found}Fast" not in known:
            raise CheckpointError(f"{name} names the tokenizer class {found!r}, which transformers does not know")


def _listed(names: Iterable[str], at_most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
