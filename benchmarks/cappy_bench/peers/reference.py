"""Gives the scores to compare with: PyTorch in float32, one pair at a time.

Attention is eager, and the tokenizer transformers' own, as in `cappy_export.proof.reference`, by which a bundle is
proven. It is not a contestant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cappy_bench.peers.batches import Batched
from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.pytorch import pad_token_id, runs
from cappy_bench.peers.worker import serve
from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer


class ReferenceRunner:
    """One pair at a time."""

    def __init__(self, model: Model) -> None:
        torch.set_num_threads(model.threads)
        checkpoint = open_checkpoint(model.require_checkpoint())
        module = load_model(checkpoint)
        self.computed_tokens: int | None = None
        self._tokenizer = load_tokenizer(checkpoint, max_length=model.max_length)
        self._batched = Batched(model, runs(module), pad_token_id=pad_token_id(module), batch_tokens=1)

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        return self._batched.score(pairs)

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids of transformers' tokenizer."""
        found: list[list[int]] = self._tokenizer(
            list(pairs), truncation=True, max_length=self._tokenizer.model_max_length
        )["input_ids"]
        return found


def open_runner(model: Model, precision: str) -> ReferenceRunner:
    """Load the checkpoint."""
    return ReferenceRunner(model)


if __name__ == "__main__":
    serve(open_runner)
