"""Tokenised, sorted and padded batches, for runners whose tool leaves batching to its user."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_engine import batching
from cappy_engine.tokenizer import PairTokenizer

Ids = npt.NDArray[np.int64]
BATCH_TOKENS = 512
"""The same as our engine's default on a CPU; larger batches were slower with every tool that was tried."""

Run = Callable[[Ids, Ids, Ids], Scores]
"""token ids, attention mask and token type ids, each (batch, length) int64, to scores (batch,) float32"""


class Batched:
    """A runner of a tool that scores one padded batch: `run`. Sorted batches of at most `batch_tokens` tokens."""

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
        for batch in batching.plan_batches(lengths, max_batch_tokens=self._batch_tokens):
            scores[batch.rows] = self._run(*self._arrays(encoded, batch))
            self.computed_tokens = (self.computed_tokens or 0) + batch.padded_tokens
        return scores

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [row.tolist() for row in self._tokenizer.encode(pairs).token_ids]

    def _arrays(self, encoded: batching.EncodedPairs, batch: batching.Batch) -> tuple[Ids, Ids, Ids]:
        inputs = batching.model_inputs(encoded, batch, pad_token_id=self._pad_token_id)
        return inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]
