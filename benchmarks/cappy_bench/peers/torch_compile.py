"""Scores with torch.compile (inductor) with dynamic shapes, on sorted batches.

Compiling is part of opening: a batch of one pair and one of several, at two lengths, so that no shape is special. The
compiled kernels are kept in `model.folder`.
"""

from __future__ import annotations

import os

import torch

from cappy_bench.peers.batches import Batched
from cappy_bench.peers.peer import Model
from cappy_bench.peers.torch_model import load_torch, pad_token_id, runs
from cappy_bench.peers.worker import serve

WARM_UP = [("a b c", "d"), ("a b c d e f g h i j k l", "m n o p q r s t u v w x y z")]


def open_runner(model: Model, precision: str) -> Batched:
    """Load the checkpoint with its weights in `precision` and compile it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(model.folder.resolve() / "inductor")
    module = load_torch(model, precision)
    compiled = torch.compile(module, dynamic=True)
    runner = Batched(model, runs(module, compiled), pad_token_id=pad_token_id(module))
    for pairs in (WARM_UP, WARM_UP[:1], WARM_UP[1:], WARM_UP * 3):
        runner.score(pairs)
    runner.score(WARM_UP[:1], pad_to=model.max_length)
    return runner


if __name__ == "__main__":
    serve(open_runner)
