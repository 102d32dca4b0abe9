"""Tokenises, sorts and pads pairs, for runners whose tool leaves batching to its user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_engine.batching import Ids, model_inputs, plan_batches
from cappy_engine.tokenizer import PairTokenizer

Inputs = Mapping[str, Ids]
"""`input_ids`, `attention_mask` and more, as `batching.model_inputs` makes them: each (batch, length) int64"""
BATCH_TOKENS = 512
"""The same as our engine's default on a CPU; larger batches were slower with every tool that was tried."""

Run = Callable[[Inputs], Scores]
"""one batch to its scores (batch,) float32"""


class Batched:
    """A runner that sorts pairs into batches of at most `batch_tokens`; `run` scores one."""

    def __init__(self, model: Model, run: Run, *, pad_token_id: int, batch_tokens: int = BATCH_TOKENS) -> None:
        self.computed_tokens: int | None = 0
        self._tokenizer = PairTokenizer.from_file(model.bundle / "tokenizer.json", max_length=model.max_length)
        self._run = run
        self._pad_token_id = pad_token_id
        self._batch_tokens = batch_tokens

    def score(self, pairs: Sequence[Pair], *, pad_to: int | None = None) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        encoded = self._tokenizer.encode(pairs)
        lengths = encoded.lengths if pad_to is None else np.full_like(encoded.lengths, pad_to)
        scores = np.empty(len(lengths), dtype=np.float32)
        for batch in plan_batches(lengths, max_batch_tokens=self._batch_tokens):
            scores[batch.rows] = self._run(model_inputs(encoded, batch, pad_token_id=self._pad_token_id))
            self.computed_tokens = (self.computed_tokens or 0) + batch.padded_tokens
        return scores

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [row.tolist() for row in self._tokenizer.encode(pairs).token_ids]
