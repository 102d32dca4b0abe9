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
FAIR_ROUNDS = 4
WORTH_WAITING = 1.3
"""How much longer than with equal shares the last worker may take; threads that share a batch lose 5 to 30%."""


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
    counts = _cut(ordered, _fair_budget(ordered, max_batch_tokens, padding, workers), padding)
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [Batch(order[end - count : end], int(ordered[end - count])) for count, end in zip(counts, ends, strict=True)]


def keeps_busy(batches: Sequence[Batch], lengths: Ids, workers: int) -> bool:
    """Whether `workers`, each with one core and taking the batches in turn, end at about one time.

    If not, all cores together on one batch after the other are faster, though they wait for each other within it.
    """
    loads = [0] * workers
    for batch in batches:
        loads[loads.index(min(loads))] += int(lengths[batch.rows].sum())
    return max(loads) * workers <= WORTH_WAITING * sum(loads)


def _fair_budget(ordered: Ids, budget: int, padding: Padding, workers: int) -> int:
    """The least budget with which `workers` need no more rounds than with `budget`: then their shares are about equal.

    With many rounds the last one hardly matters, and `budget` is kept.
    """
    total = int(ordered.sum())
    rounds = max(1, -(-total // (budget * workers)))
    if workers == 1 or rounds > FAIR_ROUNDS:
        return budget
    least = max(1, -(-total // (rounds * workers)))
    most = min(budget, least + int(ordered[0] if len(ordered) else 0))  # only whole rows fit
    while least < most:
        middle = (least + most) // 2
        if len(_cut(ordered, middle, padding)) <= rounds * workers:
            most = middle
        else:
            least = middle + 1
    return least


def _cut(ordered: Ids, budget: int, padding: Padding) -> list[int]:
    """How many rows each batch takes, of lengths that are `ordered`, longest first."""
    counts: list[int] = []
    start = 0
    while start < len(ordered):
        counts.append(_count_fitting(ordered[start:], budget, padding))
        start += counts[-1]
    return counts


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


def position_ids(token_ids: Ids, *, pad_token_id: int) -> Ids:
    """The places of tokens as RoBERTa counts them, (batch, length) int64: from the padding's id on, which padding has.

    transformers' create_position_ids_from_input_ids; a token in a text that is the padding's has no place either.
    """
    is_text = (token_ids != pad_token_id).astype(np.int64)
    places: Ids = np.cumsum(is_text, axis=1) * is_text + pad_token_id
    return places
