"""Scores with PyTorch under torch.autocast: weights in float32, products in bfloat16, on sorted batches."""

from __future__ import annotations

import torch

from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.torch_model import TYPES, load_torch, pad_token_id, runs
from cappy_bench.peers.worker import serve


def open_runner(model: Model, precision: str) -> Batched:
    """Load the checkpoint in float32, to be computed in `precision`."""
    module = load_torch(model)
    forward = runs(module)

    def run(inputs: Inputs) -> Scores:
        with torch.autocast("cpu", dtype=TYPES[precision]):
            return forward(inputs)

    return Batched(model, run, pad_token_id=pad_token_id(module))


if __name__ == "__main__":
    serve(open_runner)
