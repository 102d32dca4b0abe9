"""Choose the fixed lengths ("buckets") to which pairs are padded.

A device that wants few shapes needs them: TensorRT wants an engine for each bucket.

Pure: counts of lengths in, lengths out; knows nothing of devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

USUAL_LENGTHS = (64, 128, 256, 512)


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Choose buckets where nothing is known of the lengths: USUAL_LENGTHS below `max_length`, then `max_length`.

    >>> default_buckets(200)
    (64, 128, 200)
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    return (*(length for length in USUAL_LENGTHS if length < max_length), max_length)


def choose_buckets(counts: Mapping[int, int], k: int, *, max_length: int, multiple: int = 8) -> tuple[int, ...]:
    """Choose at most `k` ascending lengths that rows are padded to, with the least padding.

    `counts` maps the length of rows to their number. Each chosen length is a multiple of `multiple`, but for the last
    one, which is `max_length`. Fewer than `k` are chosen where more do not help.

        >>> choose_buckets({40: 100, 200: 100, 512: 1}, 2, max_length=512)
        (200, 512)

    Raises ValueError for k, max_length or multiple < 1, a length outside of 1 to max_length, a negative count.

    Exact: a bucket that ends above the longest of its rows could end there, so only their rounded lengths come into
    question. Takes k * n**2 / 2 steps for n of those (64 at most, with the defaults and 512 tokens).
    """
    _check(counts, k, max_length, multiple)
    rows = Counter({max_length: 0})
    for length, count in counts.items():
        rows[min(max_length, -(-length // multiple) * multiple)] += count
    ends = sorted(end for end, count in rows.items() if count or end == max_length)
    up_to = list(accumulate(rows[end] for end in ends))  # rows that are no longer than ends[place]
    tokens = [end * total for end, total in zip(ends, up_to, strict=True)]  # the least, with ends[place] as last bucket
    chosen: list[tuple[int, ...]] = [(end,) for end in ends]
    for _ in range(min(k, len(ends)) - 1):
        fewer_tokens, fewer = tokens.copy(), chosen.copy()
        for place, end in enumerate(ends):
            for before in range(place):
                total = fewer_tokens[before] + end * (up_to[place] - up_to[before])
                if total < tokens[place]:
                    tokens[place], chosen[place] = total, (*fewer[before], end)
    return chosen[-1]


def bucket_lengths(lengths: npt.NDArray[np.int64], buckets: Sequence[int]) -> npt.NDArray[np.int64]:
    """Round every length, (n,) int64, up to its bucket: (n,) int64. `buckets` ascend.

        >>> bucket_lengths(np.array([5, 70]), (64, 128)).tolist()
        [64, 128]

    Raises ValueError where a length exceeds the last bucket.
    """
    if len(lengths) and lengths.max() > buckets[-1]:
        raise ValueError(f"a row of {lengths.max()} tokens fits no bucket; the last one is {buckets[-1]}")
    ends = np.array(buckets, dtype=np.int64)
    rounded: npt.NDArray[np.int64] = ends[np.searchsorted(ends, lengths)]
    return rounded


def _check(counts: Mapping[int, int], k: int, max_length: int, multiple: int) -> None:
    for name, value in (("k", k), ("max_length", max_length), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for length, count in counts.items():
        if not 1 <= length <= max_length:
            raise ValueError(f"a length must be from 1 to max_length, {max_length}, got {length}")
        if count < 0:
            raise ValueError(f"a count must not be negative, got {count} for length {length}")
