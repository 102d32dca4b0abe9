"""The batch planner, for any lengths and any budget; and what a batch looks like to the model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.batching import MOST_PADDED, Batch, Ids, Padding, keeps_busy, plan_batches
from cappy_engine.inputs import attention_mask, pad

lengths_of_rows = st.lists(st.integers(0, 600), max_size=200).map(lambda lengths: np.array(lengths, dtype=np.int64))
budgets = st.integers(1, 5000)
paddings: st.SearchStrategy[Padding] = st.sampled_from(("removed", "avoided", "allowed"))
numbers_of_workers = st.integers(1, 9)


@given(lengths=lengths_of_rows, budget=budgets)
def test_no_batch_could_take_the_next_row_too(lengths: Ids, budget: int) -> None:
    batches = plan_batches(lengths, max_batch_tokens=budget)
    for batch in batches[:-1]:
        assert (len(batch.rows) + 1) * max(1, batch.length) > budget


@given(lengths=lengths_of_rows, budget=budgets, padding=paddings, workers=numbers_of_workers)
def test_every_row_runs_once_whatever_is_asked(lengths: Ids, budget: int, padding: Padding, workers: int) -> None:
    batches = plan_batches(lengths, max_batch_tokens=budget, padding=padding, workers=workers)
    assert sorted(int(row) for batch in batches for row in batch.rows) == list(range(len(lengths)))
    assert all(batch.length == max(lengths[batch.rows]) for batch in batches)


@given(lengths=lengths_of_rows, budget=budgets, padding=paddings)
def test_the_longest_rows_come_first(lengths: Ids, budget: int, padding: Padding) -> None:
    batches = plan_batches(lengths, max_batch_tokens=budget, padding=padding)
    order = [int(row) for batch in batches for row in batch.rows]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_workers_that_take_batches_in_turn_end_together(workers: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(10, 120, 40 * workers)
    batches = plan_batches(lengths, max_batch_tokens=512, padding="removed", workers=workers)
    tokens = [int(lengths[batch.rows].sum()) for batch in batches]
    assert tokens == sorted(tokens, reverse=True)
    loads = [0] * workers
    for load in tokens:
        loads[loads.index(min(loads))] += load
    assert max(loads) <= 1.01 * sum(loads) / workers


@given(lengths=lengths_of_rows, budget=budgets, workers=numbers_of_workers)
def test_removed_padding_does_not_count_against_the_budget(lengths: Ids, budget: int, workers: int) -> None:
    for batch in plan_batches(lengths, max_batch_tokens=budget, padding="removed", workers=workers):
        assert lengths[batch.rows].sum() <= budget or len(batch.rows) == 1


@given(lengths=lengths_of_rows, budget=budgets)
def test_no_batch_without_padding_could_take_the_next_row_too(lengths: Ids, budget: int) -> None:
    """A row of no tokens counts as one, so that batches end."""
    counted = np.maximum(lengths, 1)
    batches = plan_batches(lengths, max_batch_tokens=budget, padding="removed")
    for batch, following in pairwise(batches):
        assert counted[batch.rows].sum() + counted[following.rows[0]] > budget


@given(lengths=lengths_of_rows, budget=budgets, workers=numbers_of_workers)
def test_where_padding_is_avoided_there_is_none(lengths: Ids, budget: int, workers: int) -> None:
    for batch in plan_batches(lengths, max_batch_tokens=budget, padding="avoided", workers=workers):
        assert set(lengths[batch.rows]) == {batch.length}
        assert batch.padded_tokens == lengths[batch.rows].sum()
        assert batch.padded_tokens <= budget or len(batch.rows) == 1


@given(lengths=lengths_of_rows, budget=budgets)
def test_where_padding_is_avoided_no_batch_could_take_the_next_row_of_its_length(lengths: Ids, budget: int) -> None:
    batches = plan_batches(np.maximum(lengths, 1), max_batch_tokens=budget, padding="avoided")
    for batch, following in pairwise(batches):
        assert following.length < batch.length or (len(batch.rows) + 1) * max(1, batch.length) > budget


@given(lengths=lengths_of_rows, budget=budgets, workers=numbers_of_workers)
def test_workers_do_not_make_batches_larger(lengths: Ids, budget: int, workers: int) -> None:
    for batch in plan_batches(lengths, max_batch_tokens=budget, workers=workers):
        assert batch.padded_tokens <= budget or len(batch.rows) == 1


@given(
    length=st.integers(1, 300),
    rows_of_a_batch=st.integers(1, 12),
    rounds=st.integers(1, 6),
    workers=numbers_of_workers,
    padding=paddings,
)
def test_equal_rows_give_every_worker_equally_many_batches(
    length: int, rows_of_a_batch: int, rounds: int, workers: int, padding: Padding
) -> None:
    lengths = np.full(rows_of_a_batch * rounds * workers, length, dtype=np.int64)
    budgets_that_hold_them = (rows_of_a_batch * length, (rows_of_a_batch + 1) * length - 1)
    for budget in budgets_that_hold_them[: 1 if rounds > 1 else 2]:
        batches = plan_batches(lengths, max_batch_tokens=budget, padding=padding, workers=workers)
        assert len(batches) == rounds * workers
        assert {len(batch.rows) for batch in batches} == {rows_of_a_batch}


@pytest.mark.parametrize(("rows", "workers"), [(5, 2), (17, 8), (9, 4)])
def test_rows_that_do_not_divide_evenly_still_run_in_one_round(rows: int, workers: int) -> None:
    """All fit into one round at this budget, and a further round would be one batch with the other workers idle."""
    lengths = np.full(rows, 64, dtype=np.int64)
    batches = plan_batches(lengths, max_batch_tokens=512, padding="removed", workers=workers)
    assert len(batches) <= workers


def test_no_rows_make_no_batches() -> None:
    assert plan_batches(np.array([], dtype=np.int64), max_batch_tokens=512) == []


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([3, 9, 6], 12, [[1], [2, 0]]),
        ([100, 1, 1], 10, [[0], [1, 2]]),
        ([2, 2, 2], 1, [[0], [1], [2]]),
        ([7], 7, [[0]]),
    ],
)
def test_plans_of_a_few_rows(lengths: list[int], budget: int, rows: list[list[int]]) -> None:
    found = plan_batches(np.array(lengths, dtype=np.int64), max_batch_tokens=budget)
    assert [batch.rows.tolist() for batch in found] == rows


@given(lengths=lengths_of_rows, budget=budgets, value=st.integers(0, 9))
def test_padding_is_on_the_right_and_the_mask_tells_it(lengths: Ids, budget: int, value: int) -> None:
    sequences = [np.arange(length, dtype=np.int64) + 1000 * row for row, length in enumerate(lengths)]
    for batch in plan_batches(lengths, max_batch_tokens=budget):
        padded, mask = pad(sequences, batch, value=value), attention_mask(lengths, batch)
        assert padded.shape == mask.shape == (len(batch.rows), batch.length)
        assert padded.dtype == mask.dtype == np.int64
        for row, row_ids, row_mask in zip(batch.rows, padded, mask, strict=True):
            padding = batch.length - int(lengths[row])
            assert row_ids.tolist() == sequences[row].tolist() + [value] * padding
            assert row_mask.tolist() == [1] * int(lengths[row]) + [0] * padding


def test_pad_takes_only_the_rows_of_the_batch_in_their_order() -> None:
    sequences = [np.array(ids, dtype=np.int64) for ids in ([1], [2, 3], [4, 5, 6])]
    batch = Batch(np.array([2, 0], dtype=np.int64), 3)
    assert pad(sequences, batch, value=9).tolist() == [[4, 5, 6], [1, 9, 9]]
    assert attention_mask(np.array([1, 2, 3], dtype=np.int64), batch).tolist() == [[1, 1, 1], [1, 0, 0]]


@given(count=st.integers(1, 40), length=st.integers(1, 300), workers=st.integers(2, 16))
def test_equal_batches_keep_workers_busy_only_in_full_rounds(count: int, length: int, workers: int) -> None:
    lengths = np.full(count, length, dtype=np.int64)
    batches = plan_batches(lengths, max_batch_tokens=1)
    rounds = -(-count // workers)
    assert keeps_busy(batches, lengths, workers) == (rounds * workers <= 1.3 * count)


@pytest.mark.parametrize(
    ("lengths", "workers", "is_shared"),
    [
        ([100], 2, False),  # one pair has all cores
        ([100, 90], 2, True),
        ([300, 40], 2, False),  # one core would wait for the other
        ([60, 60, 60, 60], 16, False),  # 12 cores would do nothing
        ([60] * 32, 16, True),
        ([], 2, True),
    ],
)
def test_work_is_shared_where_no_core_waits_for_long(lengths: list[int], workers: int, is_shared: bool) -> None:
    found = np.array(lengths, dtype=np.int64)
    batches = plan_batches(found, max_batch_tokens=512, padding="removed", workers=workers)
    assert keeps_busy(batches, found, workers) is is_shared


def test_one_long_row_does_not_have_thousands_of_short_ones_padded_to_its_length() -> None:
    lengths = np.array([8192, *[10] * 20_000], dtype=np.int64)
    batches = plan_batches(lengths, max_batch_tokens=100_000, padding="removed")
    assert sum(len(batch.rows) for batch in batches) == len(lengths)
    assert max(batch.padded_tokens for batch in batches) <= MOST_PADDED
    equal = np.full(1000, 8192, dtype=np.int64)  # nothing is padded, so the budget alone counts
    assert len(plan_batches(equal, max_batch_tokens=2 * MOST_PADDED, padding="removed")) == 1


@pytest.mark.parametrize("workers", [2, 16, 64])
def test_workers_hold_no_more_padding_at_once_than_one_does(workers: int) -> None:
    lengths = np.array([8192] * workers + [10] * 8000, dtype=np.int64)
    batches = plan_batches(lengths, max_batch_tokens=16_384, padding="removed", workers=workers)
    assert sum(batch.padded_tokens for batch in batches[:workers]) <= max(MOST_PADDED, workers * 16_384)


def test_a_row_above_the_budget_does_not_cut_the_others_into_more_batches() -> None:
    lengths = np.array([8192, *[10] * 100], dtype=np.int64)
    batches = plan_batches(lengths, max_batch_tokens=512, padding="removed", workers=4)
    assert len(batches) == 4
