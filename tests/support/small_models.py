"""Small random models of the architectures whose graphs are written directly, and what PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BertConfig, ElectraConfig, PretrainedConfig, PreTrainedModel, RobertaConfig
from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Inputs = dict[str, Ids]

LONGEST = 48
WORDS = 200
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 1,
}


def random_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A small model with `random_weights`."""
    of_kind = {
        "roberta": (RobertaConfig, {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}),
        "bert": (BertConfig, {"max_position_embeddings": LONGEST}),
        "electra": (ElectraConfig, {"max_position_embeddings": LONGEST, "embedding_size": 16}),
    }
    config_class, shape = of_kind[kind]
    return random_weights(config_class(**{**SHAPE, **shape, **changes}))


def random_weights(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config with random weights, biases and norms, and scores that vary."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if name.lower().endswith("norm.weight") else 0.0, 0.4)
    return model


def weights_of(model: PreTrainedModel) -> dict[str, npt.NDArray[Any]]:
    """The model's weights, as what writes graphs takes them."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def torch_logits(model: PreTrainedModel, inputs: Mapping[str, Ids]) -> Floats:
    """PyTorch's logits (batch, 1)."""
    with torch.inference_mode():
        logits: Floats = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    return logits
