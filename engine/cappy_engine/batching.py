"""Which pairs run together. Pure: lengths in, batches out; knows nothing of models or devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """`rows` (batch,) int64 are the places in the input; `length` is the tokens that each row is padded to."""

    rows: Ids
    length: int

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model computes for this batch, padding included."""
        return len(self.rows) * self.length


def plan_batches(lengths: Ids, *, max_batch_tokens: int) -> list[Batch]:
    """Group rows of similar length into batches of at most `max_batch_tokens` padded tokens, longest first.

    `lengths` is (n,) int64. Every row is in exactly one batch; a row longer than the budget runs alone. Longest first,
    so that memory peaks at the first batch and never grows later.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, max_batch_tokens // max(1, longest))]
        batches.append(Batch(rows, longest))
        start += len(rows)
    return batches


def pad(sequences: Sequence[Ids], batch: Batch, *, value: int) -> Ids:
    """The batch's rows of `sequences`, padded on the right with `value`: (batch, length) int64."""
    padded = np.full((len(batch.rows), batch.length), value, dtype=np.int64)
    for place, row in enumerate(batch.rows):
        padded[place, : len(sequences[row])] = sequences[row]
    return padded


def attention_mask(lengths: Ids, batch: Batch) -> Ids:
    """1 for the batch's real tokens, 0 for padding: (batch, length) int64."""
    return (np.arange(batch.length) < lengths[batch.rows][:, None]).astype(np.int64)
