"""Scores with PyTorch as it comes, on sorted batches, as a careful user does."""

from __future__ import annotations

from cappy_bench.peers.batches import Batched
from cappy_bench.peers.peer import Model
from cappy_bench.peers.torch_model import load_torch, pad_token_id, runs
from cappy_bench.peers.worker import serve


def open_runner(model: Model, precision: str) -> Batched:
    """Load the checkpoint with its weights in `precision`."""
    module = load_torch(model, precision)
    return Batched(model, runs(module), pad_token_id=pad_token_id(module))


if __name__ == "__main__":
    serve(open_runner)
