"""Which pairs run together, and which run decides what. Pure: lengths in, batches out; knows nothing of models.

Padding costs as much as text, so there are three ways to deal with it (`Padding`):

- "removed": the graph takes it out before it computes (`Manifest.unpadded`); any pairs may share a batch.
- "avoided": only pairs of one length share a batch. So nothing is computed for padding on a CPU, and a pair's score
  cannot depend on its neighbours.
- "allowed": pairs of similar length share a batch; for GPUs, which need large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Padding = Literal["removed", "avoided", "allowed"]


@dataclass(frozen=True)
class Batch:
    """`rows` (batch,) int64 are the places in the input; `length` is the tokens that each row is padded to."""

    rows: Ids
    length: int

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model computes for this batch, padding included."""
        return len(self.rows) * self.length


def plan_batches(lengths: Ids, *, max_batch_tokens: int, padding: Padding = "allowed", workers: int = 1) -> list[Batch]:
    """Group rows of similar length into batches of at most `max_batch_tokens` tokens, longest first.

    `lengths` is (n,) int64. Every row is in exactly one batch; a row longer than the budget runs alone. Padding counts
    where it is "allowed", as it is computed there. Longest first, so that memory peaks at the first batch and never
    grows later. With several `workers`, which take batches in turn, a batch holds about a fair share, to a row.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    budget = _fair_budget(lengths, max_batch_tokens, workers)
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        count = _count_fitting(ordered[start:], budget, padding)
        batches.append(Batch(order[start : start + count], int(ordered[start])))
        start += count
    return batches


def _fair_budget(lengths: Ids, budget: int, workers: int) -> int:
    """`budget`, or less: what gives each of `workers` about the same number of tokens in as few rounds as possible."""
    if workers == 1 or not len(lengths):
        return budget
    total = int(lengths.sum())
    rounds = max(1, -(-total // (budget * workers)))
    share = -(-total // (rounds * workers))
    return min(budget, share + int(lengths.max()) - 1)  # only whole rows fit, so a share may need one more


def _count_fitting(lengths: Ids, budget: int, padding: Padding) -> int:
    """How many of the first `lengths`, longest first, make one batch: at least one."""
    longest = max(1, int(lengths[0]))
    if padding == "removed":
        ahead = np.maximum(lengths[: budget + 1], 1)  # so no more of them can fit
        return max(1, int(np.searchsorted(np.cumsum(ahead), budget, side="right")))
    count = max(1, budget // longest)
    if padding == "avoided":
        count = min(count, int(np.count_nonzero(lengths[:count] == lengths[0])))
    return max(1, count)


def pad(sequences: Sequence[Ids], batch: Batch, *, value: int) -> Ids:
    """The batch's rows of `sequences`, padded on the right with `value`: (batch, length) int64."""
    padded = np.full((len(batch.rows), batch.length), value, dtype=np.int64)
    for place, row in enumerate(batch.rows):
        padded[place, : len(sequences[row])] = sequences[row]
    return padded


def attention_mask(lengths: Ids, batch: Batch) -> Ids:
    """1 for the batch's real tokens, 0 for padding: (batch, length) int64."""
    return (np.arange(batch.length) < lengths[batch.rows][:, None]).astype(np.int64)
