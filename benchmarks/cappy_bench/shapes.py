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
GATED = ("modernbert",)
"""Types whose feed-forward has a third product, for the gate, and whose positions are rotations: they have no table."""


def read_shape(bundle: Path) -> dict[str, int]:
    """Read the sizes of the model in `bundle`, and how many products its feed-forward has.

    >>> read_shape(EMBEDDED)["layers"]
    6
    """
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    is_gated = config.get("model_type") in GATED
    return {name: int(config[theirs]) for name, theirs in NAMES.items()} | {"wide_products": 3 if is_gated else 2}


def count_parameters(shape: dict[str, int]) -> int:
    """Count the weights of layers, embeddings and head, without biases and norms.

    >>> count_parameters(read_shape(EMBEDDED))
    15377664
    """
    hidden, wide, products = shape["hidden_size"], shape["intermediate_size"], shape["wide_products"]
    embedded = shape["vocab_size"] + (shape["max_position_embeddings"] if products == 2 else 0)
    return shape["layers"] * (4 * hidden**2 + products * hidden * wide) + hidden * embedded + hidden**2
