"""Faults in a bundle's models."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import numpy_helper


def perturb(path: Path, amount: float) -> None:
    """Add `amount` to one column of the first layer's value weights in an ONNX file."""
    model = onnx.load(path)
    names = ("roberta.encoder.layer.0.attention.self.query_key_value.matrix", "Attention_0_qkv_weight")
    entry = next(entry for entry in model.graph.initializer if entry.name in names)
    weights = numpy_helper.to_array(entry).copy()
    weights[:, -1] += amount
    entry.CopyFrom(numpy_helper.from_array(weights, entry.name))
    onnx.save(model, path)
