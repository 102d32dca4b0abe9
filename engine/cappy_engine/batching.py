"""Group pairs into batches of at most `max_batch_tokens` tokens. Pure: lengths in, batches out.

Padding costs as much as text, so there are three ways to deal with it (`Padding`):

- "removed": the graph takes it out before it computes (`Manifest.unpadded`). Any pairs may share a batch.
- "avoided": only pairs of one length share a batch. Nothing is computed for padding, and a pair's score cannot depend
  on its neighbours.
- "allowed": pairs of similar length share a batch. GPUs need such large batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from cappy_engine.checks import check_count, check_word, described
from cappy_engine.shares import MOST_ROUNDS, deal

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Padding = Literal["removed", "avoided", "allowed"]
PADDINGS: tuple[Padding, ...] = get_args(Padding)
MOST_PADDED = 2**22
"""The padded tokens of a batch whose padding is removed, at most: its four arrays have 134 MB then."""
WORTH_WAITING = 1.3
"""How much longer than with equal shares the last worker may take; threads that share a batch lose 5 to 30%."""


@dataclass(frozen=True, eq=False)  # == of arrays is not a bool
class EncodedPairs:
    """Token ids of n pairs, as `PairTokenizer.encode` makes them.

    `token_ids` and `type_ids` hold n arrays (length,) int64; pairs may share types. `lengths` is (n,) int64, in tokens.
    `truncated` is (n,) bool: true where tokens were cut off to stay within the model's maximum. `without_instruction`
    are the places of pairs whose instruction has no tokens. `tokenizer` is the digest of the tokenizer that made the
    ids, None if that is not known.
    """

    token_ids: Sequence[Ids]
    type_ids: Sequence[Ids]
    lengths: Ids
    truncated: npt.NDArray[np.bool_]
    without_instruction: tuple[int, ...] = ()
    tokenizer: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def distinct(self) -> tuple[EncodedPairs, Ids]:
        """Keep the first of equal pairs; returns these m pairs, and the place of every pair among them, (n,) int64.

        >>> distinct, places = encoded.distinct()
        >>> len(distinct) <= len(encoded) == len(places)
        True
        """
        firsts: list[int] = []
        seen: dict[tuple[bytes, bytes], int] = {}
        places = np.empty(len(self), dtype=np.int64)
        for row, (ids, types) in enumerate(zip(self.token_ids, self.type_ids, strict=True)):
            place = seen.setdefault((ids.tobytes(), types.tobytes()), len(firsts))
            if place == len(firsts):
                firsts.append(row)
            places[row] = place
        return (self.chosen(firsts) if len(firsts) < len(self) else self), places

    def chosen(self, rows: Sequence[int] | Ids | npt.NDArray[np.bool_]) -> EncodedPairs:
        """Keep the pairs of some places, in the order of `rows`; or, as numpy does, those where a mask of all is true.

            >>> encoded.chosen([2, 0]).lengths.tolist() == encoded.lengths[[2, 0]].tolist()
            True

        Raises ValueError for anything else, also for negative places.
        """
        found = np.asarray(rows)
        if found.dtype == np.bool_ and found.shape == self.lengths.shape:
            found = np.flatnonzero(found)
        if found.ndim != 1 or found.dtype.kind not in ("iu" if found.size else "iuf"):  # numpy's [] is of floats
            raise ValueError(f"rows must be places, or a mask of all {len(self)} pairs, got {described(rows)}")
        outside = found[(found < 0) | (found >= len(self))]
        if outside.size:
            raise ValueError(f"rows must be places of these {len(self)} pairs, counted from 0, got {outside[0]}")
        places = found.astype(np.int64)
        without = set(self.without_instruction)
        return EncodedPairs(
            [self.token_ids[row] for row in places],
            [self.type_ids[row] for row in places],
            self.lengths[places],
            self.truncated[places],
            tuple(place for place, row in enumerate(places.tolist()) if row in without) if without else (),
            self.tokenizer,
        )

    @classmethod
    def joined(cls, parts: Sequence[EncodedPairs]) -> EncodedPairs:
        """Put the pairs of several calls one after the other. Raises ValueError for none, or several tokenizers.

        >>> len(EncodedPairs.joined([encoded, encoded])) == 2 * len(encoded)
        True
        """
        if not parts:
            raise ValueError("joined needs the pairs of at least one call, got none")
        if len(parts) == 1:
            return parts[0]
        tokenizers = {part.tokenizer for part in parts} - {None}
        if len(tokenizers) > 1:
            raise ValueError("these pairs were encoded by several tokenizers, and cannot be scored together")
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        return cls(
            [ids for part in parts for ids in part.token_ids],
            [types for part in parts for types in part.type_ids],
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            tuple(start + row for start, part in zip(starts, parts, strict=False) for row in part.without_instruction),
            next(iter(tokenizers), None),
        )


@dataclass(frozen=True)
class Batch:
    """`rows` (batch,) int64 are places in the input; each row is padded to `length` tokens."""

    rows: Ids
    length: int

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model computes for this batch, padding included."""
        return len(self.rows) * self.length


@dataclass(frozen=True)
class Grouping:
    """The limits of batches: their largest size in tokens, the way with padding, and the lengths to pad to.

    `buckets` ascend to the longest pair; they are empty where batches may have any length. Raises ValueError for a
    `max_batch_tokens` that is not a whole number of at least 1, and for an unknown `padding`.
    """

    max_batch_tokens: int
    padding: Padding = "allowed"
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_batch_tokens", check_count("max_batch_tokens", self.max_batch_tokens))
        check_word("padding", self.padding, PADDINGS)

    def changed(self, *, max_batch_tokens: int | None, padding: Padding | None) -> Grouping:
        """Return the grouping with other limits; None keeps a limit.

        With buckets, there are engines for these lengths and for batches up to this size only: larger batches and
        another padding are not taken.
        """
        tokens = self.max_batch_tokens if max_batch_tokens is None else max_batch_tokens
        asked = Grouping(tokens, self.padding if padding is None else padding)
        if self.buckets:
            return dataclasses.replace(self, max_batch_tokens=min(asked.max_batch_tokens, self.max_batch_tokens))
        return asked


@dataclass(frozen=True)
class Plan:
    """The batches of one call. If `is_shared`, each worker takes a batch and computes it with one thread.

    Otherwise one batch runs after the other, with all threads.
    """

    batches: list[Batch]
    is_shared: bool = False


def plan_batches(lengths: Ids, *, max_batch_tokens: int, padding: Padding = "allowed", workers: int = 1) -> list[Batch]:
    """Group rows of similar length into batches of at most `max_batch_tokens` tokens, longest first.

    `lengths` is (n,) int64. Every row is in exactly one batch; a row longer than the budget runs alone. Padding counts
    where it is "allowed", since it is computed there. Memory peaks at the first batch.

    Several `workers` take batches in turn, so a batch holds about a fair share of the tokens. Where padding is
    "removed", `shares.deal` mixes lengths for that, and the batch with the most tokens comes first.

        >>> [batch.rows.tolist() for batch in plan_batches(np.array([5, 9, 5]), max_batch_tokens=10)]
        [[1], [0, 2]]
    """
    if len(lengths) == 1:  # the same, in 2 us of 30
        return [Batch(np.zeros(1, dtype=np.int64), int(lengths[0]))]
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    if workers > 1 and padding == "removed":
        most = max(max_batch_tokens, MOST_PADDED // workers)  # the workers' batches together pad as one may
        shares = deal(ordered, budget=max_batch_tokens, workers=workers, most_padded=most)
        if shares is not None:
            return [Batch(order[rows], int(ordered[rows[0]])) for rows in shares]
    counts = _cut(ordered, _fair_budget(ordered, max_batch_tokens, padding, workers), padding)
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [Batch(order[end - count : end], int(ordered[end - count])) for count, end in zip(counts, ends, strict=True)]


def keeps_busy(batches: Sequence[Batch], lengths: Ids, workers: int) -> bool:
    """True if one thread per batch wastes little: the busiest worker has at most 1.3 times the average load.

    Otherwise all threads on one batch after the other are faster, though they wait for each other within a batch.

        >>> keeps_busy([Batch(np.array([0]), 9), Batch(np.array([1]), 9)], np.array([9, 9]), workers=2)
        True
    """
    loads = [0] * workers
    for batch in batches:
        loads[loads.index(min(loads))] += int(lengths[batch.rows].sum())
    return max(loads) * workers <= WORTH_WAITING * sum(loads)


def _fair_budget(ordered: Ids, budget: int, padding: Padding, workers: int) -> int:
    """Find the least budget with which `workers` need no more rounds than with `budget`.

    Then their shares are about equal. With many rounds the last one hardly matters, and `budget` is kept.
    """
    total = int(ordered.sum())
    rounds = max(1, -(-total // (budget * workers)))
    if workers == 1 or rounds > MOST_ROUNDS:
        return budget
    least = max(1, -(-total // (rounds * workers)))
    most = min(budget, least + int(ordered[0] if len(ordered) else 0))  # only whole rows fit
    while least < most:
        middle = (least + most) // 2
        is_enough = len(_cut(ordered, middle, padding)) <= rounds * workers
        least, most = (least, middle) if is_enough else (middle + 1, most)
    return least


def _cut(ordered: Ids, budget: int, padding: Padding) -> list[int]:
    """Count the rows of each batch; `ordered` lengths begin with the longest."""
    counts: list[int] = []
    while len(ordered):
        counts.append(_count_fitting(ordered, budget, padding))
        ordered = ordered[counts[-1] :]
    return counts


def _count_fitting(lengths: Ids, budget: int, padding: Padding) -> int:
    """Count the first `lengths` that make one batch, at least one; they begin with the longest."""
    longest = max(1, int(lengths[0]))
    if padding == "removed":
        ahead = np.maximum(lengths[: budget + 1], 1)  # so no more of them can fit
        fitting = int(np.searchsorted(np.cumsum(ahead), budget, side="right"))
        # One pair of 8,192 tokens beside thousands of short ones: padded they would take gigabytes.
        return max(1, min(fitting, max(budget, MOST_PADDED) // longest))
    count = max(1, budget // longest)
    return int(np.count_nonzero(lengths[:count] == lengths[0])) if padding == "avoided" else count
