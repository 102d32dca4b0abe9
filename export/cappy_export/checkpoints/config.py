"""Read a checkpoint's config files, and refuse whatever could run or fetch code.

`config.json` and `tokenizer_config.json` are parsed here and reduced to allow-lists before transformers sees them:
transformers 4.56 to 5.2 fetch and run code for some of their keys (CVE-2026-4372).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from cappy_engine.errors import CheckpointError, reason_of
from cappy_export.checkpoints import modernbert
from cappy_export.checkpoints.known_keys import kept_keys
from cappy_export.checkpoints.naming import listed, shown

COUNTS_FROM_PADDING = frozenset(
    "roberta xlm-roberta xlm-roberta-xl camembert mpnet roberta-prelayernorm data2vec-text ibert esm".split()
)
"""Model types whose position ids begin after the padding's id; a token that is padding's has none."""

REFUSED_PARTS = ("auto_map", "attn_implementation", "kernel", "quantization", "custom_", "trust_remote", "_hub")

ATTENTIONS = ("eager", "sdpa")
"""Values of a key attn_implementation that are in transformers itself: for others it may fetch code from the hub."""

UNQUANTISED = (
    "the weights are quantised: give the checkpoint that they were made from, or save the model and the tokenizer "
    "after model.dequantize(), where transformers has it for this kind"
)

RAW_SCORES: Mapping[str, Any] = {
    "problem_type": "regression",
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
}
"""Keys of a config.json by which other tools give raw scores.

Without `problem_type`, the transformers pipeline puts a sigmoid on the score; without `activation_fn`,
sentence-transformers and vLLM do.
"""

MAX_JSON_BYTES = 64 * 2**20
"""A config, or an index of weights, has some kilobytes; what is larger is refused before it is read."""


def read_config(
    folder: Path, name: str, *, needs_head: bool = True, head: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read `config.json`, reduced to the keys that the model is built from.

    >>> read_config(Path("export/cappy_mini/checkpoint"), "cappy-mini")["model_type"]
    'roberta'

    Raises CheckpointError for keys that could make transformers fetch or run code, for keys that it would lose though
    they may change scores, for values that it does not know, and for models that do not give one score for a pair.
    Unless it `needs_head`, an encoder's config is that of a model which does: see `has_head`. `head` is what the config
    of an encoder has with the head that lies beside it (`score_modules.py`).
    """
    path = folder / "config.json"
    if not path.is_file():
        found = listed(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{name} is not a checkpoint: it has no config.json; found {found}")
    config = read_json(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = "; its own code (auto_map) is never run" if "auto_map" in config else ""
        raise CheckpointError(
            f"{path} names the model type {shown(repr(model_type))}, which this transformers does not know{own_code}"
        )
    refuse_code(config, path)
    if head is not None:
        config = with_head(config, name) | dict(head)
    elif needs_head or has_head(config):
        check_architecture(config, name)
    else:
        config = with_head(config, name)
    if model_type == "modernbert":
        config = modernbert.translate(config, path)
    kept = kept_keys(config, path)
    if model_type in COUNTS_FROM_PADDING and kept.get("pad_token_id", 0) is None:
        raise CheckpointError(
            f"{path}: 'pad_token_id' is null, and {model_type} counts positions from it; write the id of the padding "
            "token that the model was trained with (mostly 1)"
        )
    return kept


def has_head(config: Mapping[str, Any]) -> bool:
    """Tell if a config is of a model with a head that gives one score.

    >>> has_head({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]})
    False
    """
    built = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.get("model_type"))
    return config.get("architectures") == [built] and _count_labels(config) == 1


def with_head(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Turn the config of an encoder into one with a head for one score.

    >>> with_head({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}, "roberta-large")["architectures"]
    ['RobertaForSequenceClassification']

    Raises CheckpointError for a generative model, and for an encoder that transformers has no such head for.
    """
    _check_encoder(config, name)
    built = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"])
    if built is None:
        raise CheckpointError(f"{name}: transformers has no head for the model type {config['model_type']}")
    left = {key: value for key, value in config.items() if key not in ("num_labels", "label2id", "problem_type")}
    return left | {"architectures": [built], "id2label": {"0": "LABEL_0"}}


def check_architecture(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError unless the model gives one score for a pair: an encoder with a head of one label.

    >>> check_architecture(read_config(Path("export/cappy_mini/checkpoint"), "cappy-mini"), "cappy-mini")
    """
    architectures, found = _check_encoder(config, name)
    model_type = config["model_type"]
    if len(architectures) != 1 or not str(architectures[0]).endswith("ForSequenceClassification"):
        raise CheckpointError(f"{name} has no regression head: {found}; needed is a model ...ForSequenceClassification")
    built = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(model_type)
    if architectures[0] != built:
        raise CheckpointError(f"{name} is {found}, but transformers has {built} for this type; its scores may differ")
    count, labels = _count_labels(config), config.get("id2label")
    if count != 1:
        names = f" ({listed(labels.values())})" if isinstance(labels, dict) and labels else ""
        raise CheckpointError(
            f"{name} has {shown(repr(count))} labels{names}, so it sorts pairs into classes and gives none of them one "
            "score; needed is a model with one label, the score, and num_labels 1 in its config.json"
        )


def _check_encoder(config: Mapping[str, Any], name: str) -> tuple[list[Any], str]:
    """Return the architectures, and what was found for people; raises CheckpointError for all but text encoders."""
    model_type, architectures = config["model_type"], config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    found = f"{listed(architectures) or 'no architecture'} (model type {model_type})"
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if model_type == "longformer":
        raise CheckpointError(f"{name} is a longformer, whose global attention the engine does not know; take another")
    if config.get("is_decoder") or config.get("is_encoder_decoder") or not is_encoder:
        raise CheckpointError(f"{name} is a generative model, or not a text encoder: {found}; needed is a text encoder")
    return architectures, found


def _count_labels(config: Mapping[str, Any]) -> Any:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)


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

    RoBERTa and its kin number positions from the padding id up, which takes `pad_token_id + 1` of them away. BigBird's
    pairs end where its sparse attention begins: once it has met a shorter pair, PyTorch computes all of the attention,
    also for longer ones, so that these have two scores.
    """
    resolved = CONFIG_MAPPING[config["model_type"]](**config_arguments(config))
    positions = int(resolved.max_position_embeddings)
    if config["model_type"] == "big_bird" and resolved.attention_type == "block_sparse":
        return min(positions, int((5 + 2 * resolved.num_random_blocks) * resolved.block_size))
    return positions - int(resolved.pad_token_id) - 1 if config["model_type"] in COUNTS_FROM_PADDING else positions


def bundle_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make a bundle's `config.json`: as transformers writes it, and such that other tools give raw scores.

    >>> bundle_config({"model_type": "bert"})["problem_type"]
    'regression'

    See RAW_SCORES.
    """
    written: dict[str, Any] = CONFIG_MAPPING[config["model_type"]](**config_arguments(config)).to_diff_dict()
    return {**written, **RAW_SCORES}


def refuse_code(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for keys, at any depth, that make transformers fetch or run code.

    >>> refuse_code({"auto_map": {"AutoModel": "evil--model.Model"}}, Path("config.json"))
    Traceback (most recent call last):
    cappy_engine.errors.CheckpointError: config.json has 'auto_map': ...
    """
    waiting: list[Any] = [config]
    while waiting:
        found = waiting.pop()
        for key, value in found.items() if isinstance(found, dict) else ():
            if "attn_implementation" in key and isinstance(value, str) and value in ATTENTIONS:
                continue
            if any(part in key for part in REFUSED_PARTS) and not isinstance(value, (int, float, type(None))):
                instead = UNQUANTISED if "quantization" in key else "remove the key"
                raise CheckpointError(
                    f"{path} has {shown(repr(key))}: {shown(repr(value))}, which can make transformers fetch or run "
                    f"code; {instead}"
                )
        children = found.values() if isinstance(found, dict) else found
        waiting += [child for child in children if isinstance(child, (dict, list))]


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint; raises CheckpointError if it holds anything else.

    >>> read_json(Path("export/cappy_mini/checkpoint/config.json"))["model_type"]
    'roberta'
    """
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def read_any_json(path: Path) -> Any:
    """Read the JSON in a file of a checkpoint, of any kind; raises CheckpointError if it cannot be read.

    >>> read_any_json(Path("my-cross-encoder/modules.json"))[0]["path"]
    ''
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} must be a file of at most {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
