"""The order of training: each row once per epoch, candidates together, little padding, the same after any stop."""

from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_export.adaptation.schedule import POOL_STEPS, Rows, count_steps, plan_epoch, plan_steps

Examples = tuple[Rows, Rows]


@st.composite
def lengths_and_groups(draw: st.DrawFn) -> Examples:
    """Up to 300 rows, some of equal length, in few or many groups; with `batch_sizes` these are one to five pools."""
    rows, longest, groups = draw(st.integers(1, 300)), draw(st.integers(1, 600)), draw(st.integers(1, 150))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.integers(1, longest + 1, rows), random.integers(0, groups, rows)


batch_sizes = st.integers(1, 8)
seeds = st.integers(0, 2**32)


def padding(lengths: Rows, steps: list[Rows]) -> int:
    return int(sum(len(rows) * lengths[rows].max() - lengths[rows].sum() for rows in steps))


def listed(steps: list[Rows]) -> list[list[int]]:
    return [rows.tolist() for rows in steps]


def ragged(candidates: int) -> Examples:
    """1200 rows of a wide range of lengths, mixed; the candidates of a group differ little in length."""
    random = np.random.default_rng(5)
    groups = random.permutation(np.repeat(np.arange(1200 // candidates), candidates))
    return random.integers(10, 500, 1200)[groups] + random.integers(0, 5, 1200), groups


# One epoch


@given(examples=lengths_and_groups(), batch_size=batch_sizes, seed=seeds, epoch=st.integers(0, 9))
def test_an_epoch_has_each_row_once_in_full_steps_but_perhaps_one(
    examples: Examples, batch_size: int, seed: int, epoch: int
) -> None:
    lengths, groups = examples
    steps = plan_epoch(lengths, groups, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(int(row) for rows in steps for row in rows) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), batch_size)
    assert sorted(map(len, steps)) == sorted([batch_size] * full + [rest] * (rest > 0))


@given(examples=lengths_and_groups(), batch_size=batch_sizes, seed=seeds)
def test_candidates_stay_together_but_at_the_borders_of_steps(examples: Examples, batch_size: int, seed: int) -> None:
    lengths, groups = examples
    steps = plan_epoch(lengths, groups, batch_size=batch_size, seed=seed, epoch=0)
    pieces = [[group for group, _ in groupby(groups[rows].tolist())] for rows in steps]
    assert all(len(set(found)) == len(found) for found in pieces)  # contiguous in each step
    # n steps have n - 1 borders between them, and a border cuts one group at most
    assert sum(map(len, pieces)) - len(set(groups.tolist())) <= len(steps) - 1


@given(examples=lengths_and_groups(), batch_size=batch_sizes, seed=seeds)
def test_steps_of_one_pool_hold_groups_of_neighbouring_lengths(examples: Examples, batch_size: int, seed: int) -> None:
    lengths, groups = (values[: POOL_STEPS * batch_size] for values in examples)
    longest = np.array([lengths[groups == group].max() for group in groups])
    steps = plan_epoch(lengths, groups, batch_size=batch_size, seed=seed, epoch=0)
    spans = sorted((int(longest[rows].min()), int(longest[rows].max())) for rows in steps)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_one_pool_of_single_candidates_pads_as_little_as_sorting_does() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, POOL_STEPS * 16)
    by_length = np.split(np.argsort(lengths), POOL_STEPS)
    assert padding(lengths, plan_epoch(lengths, np.arange(len(lengths)), batch_size=16, seed=0, epoch=0)) == padding(
        lengths, by_length
    )


@pytest.mark.parametrize("batch_size", [4, 16])  # five pools, two pools
def test_padding_is_a_small_part_of_that_of_random_order(batch_size: int) -> None:
    lengths, groups = ragged(candidates=4)
    planned = plan_epoch(lengths, groups, batch_size=batch_size, seed=0, epoch=0)
    shuffled = np.split(np.random.default_rng(1).permutation(1200), 1200 // batch_size)
    assert 0 < padding(lengths, planned) < 0.15 * padding(lengths, shuffled)


def test_steps_come_in_no_order_of_length() -> None:
    lengths = np.arange(1, 401)
    steps = plan_epoch(lengths, np.arange(400), batch_size=8, seed=0, epoch=0)
    means = [float(lengths[rows].mean()) for rows in steps]
    rises = sum(before < after for before, after in pairwise(means))
    assert 10 < rises < len(means) - 10


# The same and not the same


def test_a_plan_stays_as_it_is() -> None:
    """Or a training that was stopped would go on with other steps after an update or on another machine."""
    lengths, groups = np.array([9, 3, 5, 7, 2, 8, 4, 6]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    plans = [listed(plan_epoch(lengths, groups, batch_size=3, seed=7, epoch=epoch)) for epoch in (1, 2)]
    assert plans == [[[0, 1], [6, 7, 2], [3, 4, 5]], [[0, 1], [3, 4, 5], [6, 7, 2]]]
    assert lengths.tolist() == [9, 3, 5, 7, 2, 8, 4, 6]


@given(seed=seeds, epochs=st.tuples(st.integers(0, 50), st.integers(0, 50)).filter(lambda two: two[0] != two[1]))
def test_other_epochs_and_seeds_put_other_rows_together(seed: int, epochs: tuple[int, int]) -> None:
    lengths, groups = ragged(candidates=1)
    of = [(seed, epochs[0]), (seed, epochs[1]), (seed + 1, epochs[0])]
    plans = [
        {frozenset(rows) for rows in listed(plan_epoch(lengths, groups, batch_size=4, seed=seed, epoch=epoch))}
        for seed, epoch in of
    ]
    assert len(plans[0] & plans[1]) < 30  # of 300 steps
    assert len(plans[0] & plans[2]) < 30


# All epochs


@given(
    examples=lengths_and_groups(), batch_size=batch_sizes, seed=seeds, epochs=st.integers(1, 4), share=st.floats(0, 1.1)
)
def test_going_on_after_any_step_gives_exactly_the_steps_left(
    examples: Examples, batch_size: int, seed: int, epochs: int, share: float
) -> None:
    lengths, groups = examples
    every = [
        rows
        for epoch in range(epochs)
        for rows in listed(plan_epoch(lengths, groups, batch_size=batch_size, seed=seed, epoch=epoch))
    ]
    done = int(share * len(every))
    left = plan_steps(lengths, groups, batch_size=batch_size, seed=seed, epochs=epochs, done=done)
    assert [(number, rows.tolist()) for number, rows in left] == list(enumerate(every, start=1))[done:]
    assert count_steps(len(lengths), batch_size=batch_size, epochs=epochs) == len(every)


def test_nothing_done_is_the_default() -> None:
    steps = plan_steps(np.array([3, 1, 2]), np.array([0, 0, 1]), batch_size=2, seed=0, epochs=2)
    assert [number for number, _ in steps] == [1, 2, 3, 4]
