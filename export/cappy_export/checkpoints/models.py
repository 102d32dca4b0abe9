"""Build transformers' model for a config: without memory, to compare it with the weights, and then in float32.

Knows no file.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
)

from cappy_export.checkpoints.config import config_arguments

OTHER_HEADS = (MODEL_MAPPING, MODEL_FOR_PRETRAINING_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
PRETRAINING_HEADS = r"^(lm|mask)_predictions\."
"""Heads that DeBERTa was trained with in code of its own: they are in its published weights."""


def model_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Make transformers' config of a checkpoint's.

    >>> model_config({"model_type": "bert"}).num_labels
    1
    """
    made: PretrainedConfig = CONFIG_MAPPING[config["model_type"]](**config_arguments(config))
    return made


def build_model(config: PretrainedConfig, *, is_hollow: bool = False, attention: str = "eager") -> PreTrainedModel:
    """Build the model for pairs, in float32; a hollow one has shapes, but takes no memory.

    >>> build_model(model_config({"model_type": "bert"}), is_hollow=True).classifier.weight.device
    device(type='meta')

    `attention` is transformers' `attn_implementation`.
    """
    with _hollow() if is_hollow else contextlib.nullcontext():
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )
    return made


def with_dropout(config: PretrainedConfig, dropout: float) -> PretrainedConfig:
    """Copy a config with all its rates of dropout set to one: of activations, attention, embeddings and head.

    >>> with_dropout(model_config({"model_type": "bert"}), 0.0).hidden_dropout_prob
    0.0

    They are set before the model is built: a layer whose rate was 0 may have no dropout at all.
    """
    changed = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        is_rate = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if "dropout" in name and is_rate:
            setattr(changed, name, dropout)
    return changed


def unused_weights(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """List the `names` that transformers ignores in this model: weights of the architecture's other heads.

    >>> unused_weights(roberta, ["lm_head.bias", "roberta.pooler.dense.bias", "adapter.weight"])
    ['lm_head.bias', 'roberta.pooler.dense.bias']
    """
    extra = sorted(set(names) - set(model.state_dict()))
    if not extra:
        return []
    ignored = [re.compile(each) for each in (*(model._keys_to_ignore_on_load_unexpected or ()), PRETRAINING_HEADS)]
    known: set[str] = set()
    for mapping in OTHER_HEADS:
        for other in _classes(mapping.get(type(model.config), ())):
            with _hollow():
                keys = set(other(model.config).state_dict())
            known |= keys | {f"{model.base_model_prefix}.{key}" for key in keys if mapping is MODEL_MAPPING}
    return [name for name in extra if name in known or any(each.search(name) for each in ignored)]


def fit_encoder(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Fit an encoder's weights to a model with a head: their names as in the model, and the names that the head lacks.

    >>> fit_encoder(roberta, {"embeddings.word_embeddings.weight": embeddings})[1][0]
    'classifier.dense.bias'

    An encoder alone has names without the model's prefix. What of the weights is of another head is left out.
    """
    prefix, needed = f"{model.base_model_prefix}.", model.state_dict()
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name if prefix + name in needed else name: value for name, value in weights.items()}
    head = [name for name in needed if not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")]
    new = sorted(name for name in head if name not in weights or weights[name].shape != needed[name].shape)
    return {name: value for name, value in weights.items() if name not in new}, new


@contextlib.contextmanager
def _hollow() -> Iterator[None]:
    """Let models take no memory, and no random numbers: a training draws the same with and without them."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), no_init_weights():
        yield


def _classes(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)
