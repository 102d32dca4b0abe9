"""Read a checkpoint's config files, and refuse whatever could run or fetch code.

`config.json` and `tokenizer_config.json` are parsed here and reduced to allow-lists before transformers sees them:
transformers 4.56 to 5.2 fetch and run code for some of their keys (CVE-2026-4372).
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from cappy_engine.errors import CheckpointError

log = logging.getLogger(__name__)

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
"""Model types whose position ids begin after the padding's id; a token that is padding's has none."""

REFUSED_PARTS = ("auto_map", "attn_implementation", "kernel", "quantization", "custom_", "trust_remote", "_hub")


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read `config.json`, reduced to the keys that its architecture knows.

    >>> read_config(Path("export/cappy_mini/checkpoint"), "cappy-mini")["model_type"]
    'roberta'

    Raises CheckpointError, also for keys that could make transformers fetch or run code.
    """
    path = folder / "config.json"
    if not path.exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{name} is not a checkpoint: it has no config.json; found {found}")
    config = read_json(path)
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


def check_architecture(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError unless the model gives one score for a pair: an encoder with a head of one label.

    >>> check_architecture(read_config(Path("export/cappy_mini/checkpoint"), "cappy-mini"), "cappy-mini")
    """
    model_type, architectures = config["model_type"], config.get("architectures") or []
    found = f"{', '.join(map(str, architectures)) or 'no architecture'} (model type {model_type})"
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.get("is_decoder") or config.get("is_encoder_decoder") or not is_encoder:
        raise CheckpointError(f"{name} is a generative model, or not a text encoder: {found}; needed is a text encoder")
    if len(architectures) != 1 or not str(architectures[0]).endswith("ForSequenceClassification"):
        raise CheckpointError(f"{name} has no regression head: {found}; needed is a model ...ForSequenceClassification")
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if count != 1:
        raise CheckpointError(f"{name} has {count} labels; needed is one (the score): num_labels 1 in config.json")


def config_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for transformers' config class: all that was kept, and one label.

    >>> config_arguments({"model_type": "bert", "hidden_size": 64})
    {'hidden_size': 64, 'num_labels': 1}
    """
    return {key: value for key, value in config.items() if key not in ("model_type", "label2id", "id2label")} | {
        "num_labels": 1
    }


def max_positions(config: Mapping[str, Any]) -> int:
    """Count the tokens of the longest pair that the model has positions for.

    >>> max_positions({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
    512

    RoBERTa and its kin number positions from the padding id up, which takes `pad_token_id + 1` of them away.
    """
    resolved = CONFIG_MAPPING[config["model_type"]](**config_arguments(config))
    positions = int(resolved.max_position_embeddings)
    return positions - int(resolved.pad_token_id) - 1 if config["model_type"] in COUNTS_FROM_PADDING else positions


def bundle_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make a bundle's `config.json`: as transformers writes it, and such that other tools give raw scores.

    >>> bundle_config({"model_type": "bert"})["problem_type"]
    'regression'

    Without `problem_type`, the transformers pipeline puts a sigmoid on the score; without `activation_fn`,
    sentence-transformers and vLLM do.
    """
    written: dict[str, Any] = CONFIG_MAPPING[config["model_type"]](**config_arguments(config)).to_diff_dict()
    written["problem_type"] = "regression"
    written["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    return written


def read_tokenizer_config(folder: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read `tokenizer_config.json`, if there is one, reduced to TOKENIZER_KEYS and special tokens.

    >>> read_tokenizer_config(Path("export/cappy_mini/checkpoint"), "cappy-mini", {})["pad_token"]
    '<pad>'

    Raises CheckpointError if it, or the model's `config`, names a class that is not a tokenizer.
    """
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.exists() else {}
    refuse_code(found, path)
    kept = {key: value for key, value in found.items() if key in TOKENIZER_KEYS or key.endswith("_token")}
    _check_tokenizer_class(name, kept, config)
    return kept


def _check_tokenizer_class(name: str, *configs: Mapping[str, Any]) -> None:
    """Let the named class be a tokenizer: transformers would take any of its classes by this name."""
    known = {str(entry) for pair in TOKENIZER_MAPPING_NAMES.values() for entry in pair} | {"PreTrainedTokenizerFast"}
    for config in configs:
        found = config.get("tokenizer_class")
        if found is not None and found not in known and f"{found}Fast" not in known:
            raise CheckpointError(f"{name} names the tokenizer class {found!r}, which transformers does not know")


def refuse_code(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for keys, at any depth, that make transformers fetch or run code.

    >>> refuse_code({"auto_map": {"AutoModel": "evil--model.Model"}}, Path("config.json"))
    Traceback (most recent call last):
    cappy_engine.errors.CheckpointError: config.json has 'auto_map': ...
    """
    for key, value in config.items():
        if any(part in key for part in REFUSED_PARTS) and not isinstance(value, (int, float, type(None))):
            raise CheckpointError(
                f"{path} has {key!r}: {value!r}, which can make transformers fetch or run code; remove the key"
            )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                refuse_code(child, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint; raises CheckpointError if it holds anything else.

    >>> read_json(Path("export/cappy_mini/checkpoint/config.json"))["model_type"]
    'roberta'
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


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


def _listed(names: Iterable[str], at_most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
