"""PyTorch as it comes, on sorted batches: the reference's own speed when its user batches well."""

from __future__ import annotations

from benchmarks.runner import Model
from benchmarks.runners.batches import Batched
from benchmarks.runners.torch_model import load_torch, pad_token_id, runs


def open_runner(model: Model, precision: str) -> Batched:
    """Load the checkpoint in float32."""
    module = load_torch(model)
    return Batched(model, runs(module), pad_token_id=pad_token_id(module))
