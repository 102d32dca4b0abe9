"""Buckets: the best there are, for any lengths; and every length in its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.buckets import bucket_lengths, choose_buckets, default_buckets

numbers_of_buckets = st.integers(1, 6)
multiples = st.sampled_from((1, 3, 8, 64))


@st.composite
def counts_and_longest(draw: st.DrawFn, longest: int = 600) -> tuple[dict[int, int], int]:
    """Counts of lengths, and a max_length that none of them exceeds."""
    max_length = draw(st.integers(1, longest))
    counts = draw(st.dictionaries(st.integers(1, max_length), st.integers(0, 1000), max_size=30))
    return counts, max_length


def padded_tokens(counts: Mapping[int, int], buckets: Sequence[int]) -> int:
    """Tokens computed for rows of `counts` (length to number of rows), padding included."""
    return sum(count * next(end for end in buckets if end >= length) for length, count in counts.items())


def least_padded_tokens(counts: Mapping[int, int], k: int, max_length: int, multiple: int) -> int:
    """What `choose_buckets` must reach, by trying everything."""
    lengths = range(multiple, max_length, multiple)
    return min(
        padded_tokens(counts, (*chosen, max_length))
        for size in range(min(k, len(lengths) + 1))
        for chosen in combinations(lengths, size)
    )


@given(case=counts_and_longest(longest=16), k=st.integers(1, 4), multiple=st.integers(1, 6))
def test_no_choice_pads_less(case: tuple[dict[int, int], int], k: int, multiple: int) -> None:
    counts, max_length = case
    buckets = choose_buckets(counts, k, max_length=max_length, multiple=multiple)
    assert padded_tokens(counts, buckets) == least_padded_tokens(counts, k, max_length, multiple)


@given(case=counts_and_longest(), k=numbers_of_buckets, multiple=multiples)
def test_buckets_ascend_in_multiples_to_max_length(case: tuple[dict[int, int], int], k: int, multiple: int) -> None:
    counts, max_length = case
    buckets = choose_buckets(counts, k, max_length=max_length, multiple=multiple)
    assert 1 <= len(buckets) <= k
    assert buckets[-1] == max_length
    assert all(first < second for first, second in pairwise(buckets))
    assert all(length % multiple == 0 for length in buckets[:-1])


@given(case=counts_and_longest(), k=numbers_of_buckets, multiple=multiples)
def test_more_buckets_never_pad_more(case: tuple[dict[int, int], int], k: int, multiple: int) -> None:
    counts, max_length = case
    few, more = (choose_buckets(counts, number, max_length=max_length, multiple=multiple) for number in (k, k + 1))
    assert padded_tokens(counts, more) <= padded_tokens(counts, few)


@given(case=counts_and_longest(), k=numbers_of_buckets)
def test_every_length_fits_in_the_shortest_bucket_that_holds_it(case: tuple[dict[int, int], int], k: int) -> None:
    counts, max_length = case
    buckets = choose_buckets(counts, k, max_length=max_length)
    lengths = np.array(list(counts), dtype=np.int64)
    rounded = bucket_lengths(lengths, buckets)
    assert rounded.dtype == np.int64
    assert rounded.tolist() == [min(bucket for bucket in buckets if bucket >= length) for length in counts]


def test_a_bucket_is_spent_only_where_it_saves_padding() -> None:
    assert choose_buckets({}, 4, max_length=512) == (512,)
    assert choose_buckets({512: 7}, 4, max_length=512) == (512,)
    assert choose_buckets({30: 0, 512: 7}, 4, max_length=512) == (512,)
    assert choose_buckets({30: 5, 31: 5}, 4, max_length=512) == (32, 512)


def test_two_peaks_get_a_bucket_each() -> None:
    counts = {40: 100, 200: 100, 512: 1}
    assert choose_buckets(counts, 3, max_length=512) == (40, 200, 512)
    assert choose_buckets(counts, 2, max_length=512) == (200, 512)
    assert padded_tokens(counts, (200, 512)) == 200 * 200 + 512


def test_a_max_length_that_is_no_multiple_is_a_bucket_all_the_same() -> None:
    assert choose_buckets({509: 3, 17: 9}, 2, max_length=510) == (24, 510)
    assert choose_buckets({3: 1}, 2, max_length=5) == (5,)


def test_default_buckets_end_at_max_length() -> None:
    assert default_buckets(512) == (64, 128, 256, 512)
    assert default_buckets(200) == (64, 128, 200)
    assert default_buckets(64) == (64,)
    assert default_buckets(1024) == (64, 128, 256, 512, 1024)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        default_buckets(0)


@pytest.mark.parametrize(
    ("counts", "k", "max_length", "multiple", "problem"),
    [
        ({}, 0, 512, 8, "k must be at least 1, got 0"),
        ({}, 1, 0, 8, "max_length must be at least 1, got 0"),
        ({}, 1, 512, 0, "multiple must be at least 1, got 0"),
        ({0: 1}, 1, 512, 8, "from 1 to max_length, 512, got 0"),
        ({513: 1}, 1, 512, 8, "from 1 to max_length, 512, got 513"),
        ({5: -1}, 1, 512, 8, "got -1 for length 5"),
    ],
)
def test_what_makes_no_sense_is_an_error(
    counts: dict[int, int], k: int, max_length: int, multiple: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        choose_buckets(counts, k, max_length=max_length, multiple=multiple)


def test_a_length_above_the_last_bucket_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row of 129 tokens fits no bucket; the last one is 128"):
        bucket_lengths(np.array([3, 129], dtype=np.int64), (64, 128))


def test_no_rows_need_no_bucket() -> None:
    assert bucket_lengths(np.array([], dtype=np.int64), (64,)).tolist() == []
