"""Deal pairs out to workers that run beside each other, so that they end together. Pure: lengths in, places out."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

MOST_ROUNDS = 16
"""With more rounds than this the last one hardly matters."""


def deal(ordered: npt.NDArray[np.int64], *, budget: int, workers: int, most_padded: int) -> list[list[int]] | None:
    """Deal rows to batches with about equal tokens, in as few rounds as possible.

    `ordered` is (n,) int64, the lengths of rows in tokens, longest first. Each row goes to the batch that has the
    fewest tokens so far (Graham's longest processing time first, 1969). Returned are the places of each batch's rows,
    the fullest batch first. A batch has at most `budget` tokens.

        >>> deal(np.array([9, 5, 5, 1]), budget=10, workers=2, most_padded=64)
        [[0, 3], [1, 2]]

    It is None where a row is longer than the budget, where a batch would have more than `most_padded` tokens with its
    padding, and where it takes more than MOST_ROUNDS.
    """
    counted = np.maximum(ordered, 1).tolist()
    if not counted or counted[0] > budget:
        return None
    rounds = -(-sum(counted) // (budget * workers))
    while rounds <= MOST_ROUNDS:
        shares = _dealt(counted, min(len(counted), rounds * workers))
        if any(len(rows) * counted[rows[0]] > most_padded for _, rows in shares):
            return None
        if shares[0][0] <= budget:
            return [rows for _, rows in shares]
        rounds += 1
    return None


def _dealt(counted: list[int], count: int) -> list[tuple[int, list[int]]]:
    """Deal to `count` batches: the tokens and rows of each, the fullest first."""
    heap = [(0, number) for number in range(count)]
    shares: list[list[int]] = [[] for _ in range(count)]
    for row, tokens in enumerate(counted):
        load, number = heap[0]
        shares[number].append(row)
        heapq.heapreplace(heap, (load + tokens, number))
    return [(load, shares[number]) for load, number in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]
