"""Describe the form of ettin's rerankers: a ModernBERT, with a head in modules of sentence-transformers behind it.

The published config.json was not at hand: its keys here are those of another ModernBERT, with ettin's sizes. The files
of the modules are as sentence-transformers writes them, which a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HEAD: Mapping[str, Any] = {
    "classifier_pooling": "cls",
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "norm_bias": False,
}
"""What config.json would have if the head were the model's own."""
TYPES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "2_Dense": "sentence_transformers.base.modules.dense.Dense",
    "3_LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    "4_Dense": "sentence_transformers.base.modules.dense.Dense",
}
VECTOR = "sentence_embedding"


def config(modernbert: Mapping[str, Any], size: Mapping[str, int]) -> dict[str, Any]:
    """Make a config.json from that of another ModernBERT, of another size.

    >>> config(FAMILIES["gte-reranker-modernbert-base"].config, {"hidden_size": 256})["architectures"]
    ['ModernBertModel']
    """
    left = {key: value for key, value in modernbert.items() if key not in ("id2label", "label2id")}
    own = {"architectures": ["ModernBertModel"], "local_rope_theta": 160000.0, "max_position_embeddings": 7999}
    return {**left, **own, "torch_dtype": "float32", **size}


def write_modules(out: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write the head of `weights` as modules into `out`, and return the encoder's weights.

    >>> write_modules(Path("made"), model.state_dict())

    The encoder's weights are returned by their own names. The LayerNorm gets a bias. It changes no score: its product
    with the last Dense's weights is taken from that Dense's bias.
    """
    size = len(weights["head.norm.weight"])
    bias = torch.linspace(-0.1, 0.1, size)
    last = weights["classifier.bias"] - weights["classifier.weight"] @ bias
    dense = {"in_features": size, "out_features": size, "bias": False, "module_input_name": VECTOR}
    gelu, identity = "torch.nn.modules.activation.GELU", "torch.nn.modules.linear.Identity"
    configs = {
        "1_Pooling": {"embedding_dimension": size, "pooling_mode": "cls", "include_prompt": True},
        "2_Dense": {**dense, "activation_function": gelu, "module_output_name": VECTOR},
        "3_LayerNorm": {"dimension": size},
        "4_Dense": {
            **dense,
            "out_features": 1,
            "bias": True,
            "activation_function": identity,
            "module_output_name": "scores",
        },
    }
    for folder, content in configs.items():
        (out / folder).mkdir()
        _write(out / folder / "config.json", content)
    _save(out / "2_Dense", {"linear.weight": weights["head.dense.weight"]})
    _save(out / "3_LayerNorm", {"norm.weight": weights["head.norm.weight"], "norm.bias": bias})
    _save(out / "4_Dense", {"linear.weight": weights["classifier.weight"], "linear.bias": last})
    modules = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(TYPES.items())]
    _write(out / "modules.json", modules)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    inputs = {"transformer_task": "feature-extraction", "modality_config": {"text": text}}
    _write(out / "sentence_bert_config.json", {**inputs, "module_output_name": "token_embeddings"})
    saved: dict[str, Any] = {"model_type": "CrossEncoder", "prompts": {}, "default_prompt_name": None}
    _write(out / "config_sentence_transformers.json", {**saved, "activation_fn": identity})
    return {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))


def _save(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
