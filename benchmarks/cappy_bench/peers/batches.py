"""Tokenises, sorts and pads pairs, for runners whose tool leaves batching to its user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_engine.batching import Batch, Ids, plan_batches
from cappy_engine.inputs import model_inputs
from cappy_engine.tokenizer import PairTokenizer

Inputs = Mapping[str, Ids]
"""`input_ids`, `attention_mask` and more, as `inputs.model_inputs` makes them: each (batch, length) int64"""
BATCH_TOKENS = 512
"""The same as our engine's default on a CPU; larger batches were slower with every tool that was tried."""

Run = Callable[[Inputs], Scores]
"""one batch to its scores (batch,) float32"""


class Batched:
    """A runner that sorts pairs into batches of at most `batch_tokens`; `run` scores one, in `at_once` threads.

    Without `is_padded` the tool computes nothing for padding. With `pad_to` every pair has that length.
    """

    def __init__(
        self,
        model: Model,
        run: Run,
        *,
        pad_token_id: int,
        batch_tokens: int = BATCH_TOKENS,
        at_once: int = 1,
        is_padded: bool = True,
        pad_to: int | None = None,
    ) -> None:
        self.computed_tokens = 0
        self._tokenizer = PairTokenizer.from_file(model.bundle / "tokenizer.json", max_length=model.max_length)
        self._run = run
        self._pad_token_id = pad_token_id
        self._batch_tokens = batch_tokens
        self._at_once = at_once
        self._is_padded, self._pad_to = is_padded, pad_to
        self._map = map if at_once == 1 else ThreadPoolExecutor(at_once).map

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        encoded = self._tokenizer.encode(pairs)
        lengths = encoded.lengths if self._pad_to is None else np.full_like(encoded.lengths, self._pad_to)
        scores = np.empty(len(lengths), dtype=np.float32)
        batches = plan_batches(lengths, max_batch_tokens=self._batch_tokens, workers=self._at_once)

        def run(batch: Batch) -> Scores:
            return self._run(model_inputs(encoded, batch, pad_token_id=self._pad_token_id))

        for batch, found in zip(batches, self._map(run, batches), strict=True):
            scores[batch.rows] = found
            self.computed_tokens += batch.padded_tokens if self._is_padded else int(lengths[batch.rows].sum())
        return scores

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [row.tolist() for row in self._tokenizer.encode(pairs).token_ids]
