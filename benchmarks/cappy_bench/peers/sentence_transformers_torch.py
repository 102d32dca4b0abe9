"""Scores with sentence-transformers' CrossEncoder on PyTorch: raw scores, its own sorting and batches.

Its default activation is a sigmoid; Cappy's scores are raw, so the identity is passed. It sorts pairs by characters and
cuts batches of a fixed number of pairs. Small ones pad least: with the ONNX backend, 64 pairs of cappy-mini took 1.18 s
in batches of 1, 1.19 in 2, 1.30 in 4, 1.33 in 8, 1.74 in 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.worker import serve

BATCH = 2


class CrossEncoderRunner:
    """`CrossEncoder.predict`, with the tokens of every forward pass counted."""

    def __init__(self, encoder: CrossEncoder) -> None:
        self.computed_tokens = 0
        self._encoder = encoder
        encoder.register_forward_pre_hook(self._count)

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        found = self._encoder.predict(list(pairs), batch_size=BATCH, activation_fn=torch.nn.Identity())
        return np.asarray(found, dtype=np.float32)

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [[int(token) for token in self._encoder.preprocess([pair])["input_ids"][0]] for pair in pairs]

    def _count(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        self.computed_tokens += arguments[0]["input_ids"].numel()


def open_runner(model: Model, precision: str) -> CrossEncoderRunner:
    """Load the checkpoint in float32."""
    torch.set_num_threads(model.threads)
    return CrossEncoderRunner(
        CrossEncoder(str(model.require_checkpoint()), device="cpu", max_length=model.max_length, local_files_only=True)
    )


if __name__ == "__main__":
    serve(open_runner)
