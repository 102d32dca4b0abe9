"""Attention of the native library is that of numpy in doubles, with each instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cappy_engine.native import reference
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import Distances, Floats, Ids

CLOSE = 1e-5


def packed_rows(lengths: Ids, hidden: int, seed: int = 0) -> Floats:
    """Make queries, keys and values of tokens, (tokens, 3 * hidden)."""
    return np.random.default_rng(seed).standard_normal((int(lengths.sum()), 3 * hidden)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=5),
    heads=st.integers(1, 5),
    head_size=st.sampled_from((32, 64)) | st.integers(1, 130),
    seed=st.integers(0, 1000),
)
@example(lengths=[512], heads=2, head_size=64, seed=0)
@example(lengths=[513, 1], heads=1, head_size=32, seed=0)
@example(lengths=[600], heads=1, head_size=80, seed=0)
@example(lengths=[1100], heads=1, head_size=4, seed=0)
@example(lengths=[70, 3], heads=1, head_size=512, seed=0)
@example(lengths=[9], heads=2, head_size=513, seed=0)
def test_any_lengths_heads_and_sizes(
    library: NativeLibrary, lengths: list[int], heads: int, head_size: int, seed: int
) -> None:
    given_lengths = np.array(lengths)
    packed = packed_rows(given_lengths, heads * head_size, seed)
    wanted = reference.attention(packed, given_lengths, heads)
    for name in library.instruction_sets:
        found = library.attention(name, packed, given_lengths, heads)
        np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    head_size=st.sampled_from((32, 64)) | st.integers(1, 130),
    window=st.integers(0, 80) | st.just(10_000),
    seed=st.integers(0, 1000),
)
@example(lengths=[65, 66, 64, 129], head_size=64, window=64, seed=0)
@example(lengths=[1500], head_size=16, window=600, seed=0)
@example(lengths=[900], head_size=512, window=100, seed=0)
@example(lengths=[80], head_size=513, window=7, seed=0)
@example(lengths=[1], head_size=4, window=0, seed=0)
def test_a_token_sees_those_in_its_window_alone(
    library: NativeLibrary, lengths: list[int], head_size: int, window: int, seed: int
) -> None:
    given_lengths = np.array(lengths)
    packed = packed_rows(given_lengths, 2 * head_size, seed)
    wanted = reference.attention(packed, given_lengths, 2, window)
    for name in library.instruction_sets:
        found = library.attention(name, packed, given_lengths, 2, window)
        np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE, err_msg=name)


def test_a_pair_with_a_window_gives_the_same_alone_and_in_company(library: NativeLibrary, instruction_set: str) -> None:
    lengths = np.array([40, 150, 300])
    packed = packed_rows(lengths, 64)
    alone = library.attention(instruction_set, packed[40:190], lengths[1:2], heads=2, window=20)
    together = library.attention(instruction_set, packed, lengths, heads=2, window=20)
    np.testing.assert_array_equal(together[40:190], alone)


@pytest.mark.parametrize("head_size", [32, 64, 5])
def test_one_query_of_each_pair(library: NativeLibrary, instruction_set: str, head_size: int) -> None:
    lengths, hidden = np.array([1, 32, 7, 513]), 3 * head_size
    queries, packed = packed_rows(lengths[:1] * 4, hidden)[:, :hidden], packed_rows(lengths, hidden)[:, hidden:]
    found = library.first_attention(instruction_set, queries, packed, lengths, 3)
    wanted = reference.first_attention(queries, packed, lengths, 3)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE)


def some_distances(
    heads: int, head_size: int, farthest: int, count: int, *, most_step: int = 1, seed: int = 0
) -> Distances:
    """Draw keys and queries of distances; rows of neighbours are at most `most_step` apart."""
    random = np.random.default_rng(seed)
    keys, queries = random.standard_normal((2, heads, count, head_size)).astype(np.float32)
    steps = random.integers(-most_step, most_step + 1, 2 * farthest + 1)
    rows = np.abs((count // 2 + steps.cumsum()) % (2 * count - 1) - count + 1)  # turns back at both ends
    return Distances(keys, queries, rows, scale=0.7 / head_size**0.5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    head_size=st.sampled_from((32, 64)) | st.integers(1, 130),
    count=st.integers(1, 300),
    most_step=st.sampled_from((1, 1, 1, 2, 50)),
    seed=st.integers(0, 1000),
)
@example(lengths=[512], head_size=64, count=1024, most_step=1, seed=0)
@example(lengths=[700, 1], head_size=64, count=512, most_step=1, seed=0)
@example(lengths=[300], head_size=512, count=90, most_step=1, seed=0)
@example(lengths=[70], head_size=513, count=60, most_step=1, seed=0)
@example(lengths=[600], head_size=8, count=512, most_step=2, seed=0)
def test_distances_add_to_scores(
    library: NativeLibrary, lengths: list[int], head_size: int, count: int, most_step: int, seed: int
) -> None:
    given_lengths, heads = np.array(lengths), 2
    distances = some_distances(heads, head_size, max(lengths) + 3, count, most_step=most_step, seed=seed)
    packed = packed_rows(given_lengths, heads * head_size, seed)
    wanted = reference.attention(packed, given_lengths, heads, distances=distances)
    for name in library.instruction_sets:
        found = library.attention(name, packed, given_lengths, heads, distances=distances)
        np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE, err_msg=name)


def test_rows_of_distances_that_rise_and_fall(library: NativeLibrary, instruction_set: str) -> None:
    """Every distance has its own row, as in DeBERTa without buckets: the most that a block of queries can need."""
    lengths, heads, farthest = np.array([520, 33]), 1, 600
    for direction in (1, -1):
        drawn = some_distances(heads, 64, farthest, 2 * farthest + 1)
        distances = replace(drawn, rows=np.arange(2 * farthest + 1)[::direction])
        packed = packed_rows(lengths, 64)
        found = library.attention(instruction_set, packed, lengths, heads, distances=distances)
        wanted = reference.attention(packed, lengths, heads, distances=distances)
        np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("head_size", [32, 64, 5])
def test_distances_add_to_one_query_of_each_pair(library: NativeLibrary, instruction_set: str, head_size: int) -> None:
    lengths, hidden = np.array([1, 32, 7, 513]), 3 * head_size
    distances = some_distances(3, head_size, 513, 100)
    queries, packed = packed_rows(lengths[:1] * 4, hidden)[:, :hidden], packed_rows(lengths, hidden)[:, hidden:]
    found = library.first_attention(instruction_set, queries, packed, lengths, 3, distances)
    wanted = reference.first_attention(queries, packed, lengths, 3, distances)
    np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE)


def test_a_pair_with_distances_gives_the_same_alone_and_in_company(
    library: NativeLibrary, instruction_set: str
) -> None:
    lengths, distances = np.array([40, 150, 300]), some_distances(2, 32, 300, 64)
    packed = packed_rows(lengths, 64)
    alone = library.attention(instruction_set, packed[40:190], lengths[1:2], heads=2, distances=distances)
    together = library.attention(instruction_set, packed, lengths, heads=2, distances=distances)
    np.testing.assert_array_equal(together[40:190], alone)


@pytest.mark.parametrize(
    ("length", "last_row"), [(9, 4), (8, 5), (8, -1)], ids=["a longer pair", "too high a row", "a negative row"]
)
def test_distances_without_rows_are_refused(
    library: NativeLibrary, instruction_set: str, length: int, last_row: int
) -> None:
    distances = some_distances(1, 32, farthest=7, count=5)
    distances.rows[-1] = 4
    packed, lengths = packed_rows(np.array([9]), 32), np.array([8])
    library.attention(instruction_set, packed[:8], lengths, 1, distances=distances)
    distances.rows[-1] = last_row
    with pytest.raises(ValueError, match="or there are no rows for their distances"):
        library.attention(instruction_set, packed[:length], np.array([length]), 1, distances=distances)


def test_a_pair_of_one_token_attends_to_itself(library: NativeLibrary, instruction_set: str) -> None:
    packed = packed_rows(np.array([3]), 64)
    found = library.attention(instruction_set, packed, np.array([1, 1, 1]), heads=2)
    np.testing.assert_array_equal(found, packed[:, 128:])


def test_a_pair_s_result_does_not_depend_on_its_neighbours(library: NativeLibrary, instruction_set: str) -> None:
    lengths = np.array([40, 21, 64])
    packed = packed_rows(lengths, 64)
    alone = library.attention(instruction_set, packed[40:61], lengths[1:2], heads=2)
    np.testing.assert_array_equal(library.attention(instruction_set, packed, lengths, heads=2)[40:61], alone)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e18])
def test_extreme_scores_choose_one_key(library: NativeLibrary, instruction_set: str, size: float) -> None:
    """Scores of `size` and of minus `size`: their exponentials alone would overflow, and then be 0 / 0."""
    lengths, chosen = np.array([50]), 29
    packed = packed_rows(lengths, 32)
    packed[:, :32], packed[:, 32:64] = np.sqrt(size), -np.sqrt(size)
    packed[chosen, 32:64] = np.sqrt(size)
    found = library.attention(instruction_set, packed, lengths, heads=1)
    np.testing.assert_allclose(found, np.broadcast_to(packed[chosen, 64:], (50, 32)), rtol=1e-6)


def test_weights_too_small_for_floats_count_for_nothing(library: NativeLibrary, instruction_set: str) -> None:
    lengths = np.array([600])  # in two blocks of keys: the sums of the first are scaled down to 0
    packed = packed_rows(lengths, 32)
    packed[:, :32], packed[:, 32:64] = 1, 0
    packed[599, 32:64] = 1000
    found = library.attention(instruction_set, packed, lengths, heads=1)
    np.testing.assert_allclose(found, np.broadcast_to(packed[599, 64:], (600, 32)), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 32, 64], ids=["query", "key", "value"])
def test_what_is_not_finite_stays_in_its_pair_and_is_seen(
    library: NativeLibrary, instruction_set: str, bad: float, column: int
) -> None:
    lengths = np.array([20, 600, 20])
    packed = packed_rows(lengths, 32)
    packed[300, column] = bad
    found, wanted = library.attention(instruction_set, packed, lengths, 1), reference.attention(packed, lengths, 1)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    assert np.isfinite(found[:20]).all()
    assert np.isfinite(found[620:]).all()
    assert not np.isfinite(found).all()


@pytest.mark.parametrize("lengths", [[4, 5], [4, 7], [-1, 11], [11], [], [2**62, 2**62, 10]])
def test_lengths_that_are_not_those_of_the_tokens_are_refused(
    library: NativeLibrary, instruction_set: str, lengths: list[int]
) -> None:
    with pytest.raises(ValueError, match="are not those of pairs with 10 tokens"):
        library.attention(instruction_set, packed_rows(np.array([10]), 32), np.array(lengths, np.int64), heads=1)


def test_no_tokens_give_no_rows(library: NativeLibrary, instruction_set: str) -> None:
    nothing = np.zeros((0, 96), np.float32)
    for lengths in ([], [0, 0]):
        assert library.attention(instruction_set, nothing, np.array(lengths, np.int64), heads=1).shape == (0, 32)
