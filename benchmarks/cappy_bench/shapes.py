"""Reads a model's shape from its bundle, and counts its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
"""Our names, and those of transformers' config.json."""


def read_shape(bundle: Path) -> dict[str, int]:
    """Read the sizes of the model in the folder `bundle`.

    >>> read_shape(EMBEDDED)["layers"]
    6
    """
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    return {name: int(config[theirs]) for name, theirs in NAMES.items()}


def count_parameters(shape: dict[str, int]) -> int:
    """Count the weights of layers, embeddings and head, without biases and norms.

    >>> count_parameters(read_shape(EMBEDDED))
    15377664
    """
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    embedded = shape["vocab_size"] + shape["max_position_embeddings"]
    return shape["layers"] * (4 * hidden**2 + 2 * hidden * wide) + hidden * embedded + hidden**2
