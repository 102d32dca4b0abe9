"""Tell the keys of a config.json that the installed transformers honours, and their possible values.

A key is honoured if the architecture's config class takes it, or if its model's code reads it. Any other key is lost
when the config is built, in the exported graph and in PyTorch's reference alike: no parity check could see it.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, __version__
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.naming import listed, shown

COMMON_KEYS = frozenset(
    """architectures model_type id2label label2id num_labels problem_type pad_token_id bos_token_id eos_token_id
    sep_token_id tokenizer_class is_decoder is_encoder_decoder add_cross_attention chunk_size_feed_forward""".split()
)
"""Keys of config.json that any model has; those of one architecture are the arguments of its config class."""

IGNORED_KEYS = frozenset(
    """transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash
    _attn_implementation_autoset _attn_implementation attn_implementation
    _num_labels use_cache gradient_checkpointing finetuning_task
    output_past sentence_transformers sbert_ce_default_activation_function transformers.js_config
    task_specific_params return_dict use_return_dict output_attentions output_hidden_states torchscript
    use_bfloat16 tf_legacy_loss xla_device tie_word_embeddings tie_encoder_decoder tie_weights_ language
    prefix decoder_start_token_id cross_attention_hidden_size vocab_size_or_config_json_file
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type""".split()
) | frozenset(PretrainedConfig._get_global_generation_defaults())
"""Keys that are common and cannot change the score of a pair: where a config comes from, training, and generation."""

NEUTRAL_VALUES: Mapping[str, Any] = {
    "net_structure_type": 0,
    "gap_size": 0,
    "num_memory_blocks": 0,
    "down_scale_factor": 1,
    "is_causal": False,
    "causal_mask": False,
    "pre_trained": "",
    "training": "",
}
"""Keys that no version of transformers reads in an encoder, with the value that changes nothing (ALBERT, Ettin,
TinyBERT)."""

REPEATED = {"emb_size": "hidden_size"}
"""Keys that no version of transformers reads, with the key whose value they repeat (TinyBERT)."""

UNCHECKED = frozenset({"architectures", "model_type", "tokenizer_class", "id2label", "label2id"})
LARGEST = 2**31


def kept_keys(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the part of `config` that the model is built from.

    >>> kept_keys({"model_type": "bert", "hidden_size": 64, "use_cache": True}, Path("config.json"))
    {'model_type': 'bert', 'hidden_size': 64}

    Raises CheckpointError for keys that may change scores and would be lost, and for values that a key cannot have.
    """
    model_type = config["model_type"]
    honoured = COMMON_KEYS | set(parameters(model_type)) | _read_by_the_model(model_type)
    kept = {key: value for key, value in config.items() if key in honoured - IGNORED_KEYS}
    lost = sorted(key for key in set(config) - set(kept) - IGNORED_KEYS if not _is_neutral(key, config))
    if lost:
        version = config.get("transformers_version")
        written = f" (written by transformers {shown(version)})" if isinstance(version, str) else ""
        raise CheckpointError(
            f"{path}{written} has keys that transformers {__version__} ignores in {model_type}: {listed(lost)}. They "
            f"may change scores: save the checkpoint with transformers {__version__}, or remove a key that changes "
            "nothing"
        )
    for key, value in kept.items():
        needed = None if key in UNCHECKED else _needed(key, value, model_type)
        if needed:
            raise CheckpointError(f"{path}: {key!r} must be {needed}, found {shown(repr(value))}")
    return kept


@cache
def parameters(model_type: str) -> Mapping[str, Any]:
    """List the arguments of an architecture's config class, with their defaults.

    >>> parameters("bert")["hidden_size"]
    768
    """
    signature = inspect.signature(CONFIG_MAPPING[model_type].__init__)
    return {name: found.default for name, found in signature.parameters.items() if name not in ("self", "kwargs")}


@cache
def _sources(model_type: str) -> tuple[str, str]:
    """Read the code of the architecture's config and of its model; empty where there is none for pairs."""
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(config_class, None)
    classes = [config_class, *([model_class] if model_class else [])]
    texts = [inspect.getsource(sys.modules[each.__module__]) for each in classes]
    return texts[0], texts[1] if model_class else ""


@cache
def _read_by_the_model(model_type: str) -> frozenset[str]:
    """Find the keys that are read, but are not arguments, such as DeBERTa-v2's position_buckets."""
    config_code, model_code = _sources(model_type)
    found = re.findall(r"\bconfig\.([a-z]\w*)", model_code)
    found += re.findall(r"\bgetattr\((?:self\.)?config, [\"'](\w+)[\"']", model_code)
    found += re.findall(r"\bkwargs\.(?:get|pop)\([\"'](\w+)[\"']", config_code)
    config_class = CONFIG_MAPPING[model_type]
    return frozenset(key for key in found if not hasattr(config_class, key) and key not in config_class.attribute_map)


def _is_neutral(key: str, config: Mapping[str, Any]) -> bool:
    """Tell whether an unknown key says nothing: unset, empty, another name of the same value, or known to be unread."""
    value, renamed = config[key], CONFIG_MAPPING[config["model_type"]].attribute_map.get(key)
    if renamed in config:
        return bool(config[renamed] == value)
    if value is None or value in ([], {}):
        return True
    if key in REPEATED:
        return type(value) is int and value == config.get(REPEATED[key])
    return key in NEUTRAL_VALUES and type(value) is type(NEUTRAL_VALUES[key]) and value == NEUTRAL_VALUES[key]


def _needed(key: str, value: Any, model_type: str) -> str | None:
    """Say in words what `key` must be, if `value` is something else."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float, type(None))) for item in items):
        return "a number, a string or a list of them"
    if any(isinstance(item, (int, float)) and not (math.isfinite(item) and abs(item) < LARGEST) for item in items):
        return "a finite number below 2**31"
    default = parameters(model_type).get(key, False if key in ("is_decoder", "is_encoder_decoder") else None)
    if key.endswith("_token_id"):
        return None if value is None or (_is_whole(value) and value >= 0) else "the id of a token, or null"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, (int, float)):
        return _needed_number(key, value, default)
    if isinstance(default, str) and not isinstance(value, str):
        return None if value is None and key.startswith("summary_") else "a string"
    return _needed_text(key, [item for item in items if isinstance(item, str)], model_type)


def _needed_number(key: str, value: Any, default: float) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a whole number" if isinstance(default, int) and "drop" not in key else "a number"
    if isinstance(default, int) and "drop" not in key:
        least = None if default < 0 else 1 if default > 0 and not key.endswith("_index") else 0
        if not _is_whole(value) or (least is not None and value < least):
            return "a whole number" if least is None else f"a whole number, {least} or more"
    elif key.endswith(("_eps", "_theta")):
        return None if value > 0 else "a number above 0"
    elif value < 0 <= default:
        return "a number, 0 or more"
    return None


def _needed_text(key: str, texts: list[str], model_type: str) -> str | None:
    """Let a text be an activation, or one that the code compares with: transformers takes others for "none of them"."""
    if re.search(r"(^|_)act(ivation)?($|_)", key):
        return None if set(texts) <= set(ACT2FN) else "an activation that transformers knows"
    code = "\n".join(_sources(model_type))
    words = [word.strip() for text in texts for word in text.lower().split("|")]
    if all(f'"{word}"' in code or f"'{word}'" in code for word in words):
        return None
    return f"a value that {model_type} of transformers {__version__} knows"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
