"""The order of training: each row once per epoch, candidates together, little padding, the same after any stop."""

from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.batching import plan_batches
from cappy_export.adaptation.schedule import POOL_STEPS, Rows, plan_parts, plan_window, seed_of, share_of

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
    steps = plan_window(lengths, groups, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(int(row) for rows in steps for row in rows) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), batch_size)
    assert sorted(map(len, steps)) == sorted([batch_size] * full + [rest] * (rest > 0))


@given(examples=lengths_and_groups(), batch_size=batch_sizes, seed=seeds)
def test_candidates_stay_together_but_at_the_borders_of_steps(examples: Examples, batch_size: int, seed: int) -> None:
    lengths, groups = examples
    steps = plan_window(lengths, groups, batch_size=batch_size, seed=seed, epoch=0)
    pieces = [[group for group, _ in groupby(groups[rows].tolist())] for rows in steps]
    assert all(len(set(found)) == len(found) for found in pieces)  # contiguous in each step
    # n steps have n - 1 borders between them, and a border cuts one group at most
    assert sum(map(len, pieces)) - len(set(groups.tolist())) <= len(steps) - 1


@given(examples=lengths_and_groups(), batch_size=batch_sizes, seed=seeds)
def test_steps_of_one_pool_hold_groups_of_neighbouring_lengths(examples: Examples, batch_size: int, seed: int) -> None:
    lengths, groups = (values[: POOL_STEPS * batch_size] for values in examples)
    longest = np.array([lengths[groups == group].max() for group in groups])
    steps = plan_window(lengths, groups, batch_size=batch_size, seed=seed, epoch=0)
    spans = sorted((int(longest[rows].min()), int(longest[rows].max())) for rows in steps)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_one_pool_of_single_candidates_pads_as_little_as_sorting_does() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, POOL_STEPS * 16)
    by_length = np.split(np.argsort(lengths), POOL_STEPS)
    assert padding(lengths, plan_window(lengths, np.arange(len(lengths)), batch_size=16, seed=0, epoch=0)) == padding(
        lengths, by_length
    )


@pytest.mark.parametrize("batch_size", [4, 16])  # five pools, two pools
def test_padding_is_a_small_part_of_that_of_random_order(batch_size: int) -> None:
    lengths, groups = ragged(candidates=4)
    planned = plan_window(lengths, groups, batch_size=batch_size, seed=0, epoch=0)
    shuffled = np.split(np.random.default_rng(1).permutation(1200), 1200 // batch_size)
    assert 0 < padding(lengths, planned) < 0.15 * padding(lengths, shuffled)


def test_steps_come_in_no_order_of_length() -> None:
    lengths = np.arange(1, 401)
    steps = plan_window(lengths, np.arange(400), batch_size=8, seed=0, epoch=0)
    means = [float(lengths[rows].mean()) for rows in steps]
    rises = sum(before < after for before, after in pairwise(means))
    assert 10 < rises < len(means) - 10


# The same and not the same


def test_a_plan_stays_as_it_is() -> None:
    """Or a training that was stopped would go on with other steps after an update or on another machine."""
    lengths, groups = np.array([9, 3, 5, 7, 2, 8, 4, 6]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    plans = [listed(plan_window(lengths, groups, batch_size=3, seed=7, epoch=epoch)) for epoch in (1, 2)]
    assert plans == [[[0, 1], [6, 7, 2], [3, 4, 5]], [[0, 1], [3, 4, 5], [6, 7, 2]]]
    assert lengths.tolist() == [9, 3, 5, 7, 2, 8, 4, 6]


@pytest.mark.slow
@given(seed=seeds, epochs=st.tuples(st.integers(0, 50), st.integers(0, 50)).filter(lambda two: two[0] != two[1]))
def test_other_epochs_and_seeds_put_other_rows_together(seed: int, epochs: tuple[int, int]) -> None:
    lengths, groups = ragged(candidates=1)
    of = [(seed, epochs[0]), (seed, epochs[1]), (seed + 1, epochs[0])]
    plans = [
        {frozenset(rows) for rows in listed(plan_window(lengths, groups, batch_size=4, seed=seed, epoch=epoch))}
        for seed, epoch in of
    ]
    assert len(plans[0] & plans[1]) < 30  # of 300 steps
    assert len(plans[0] & plans[2]) < 30


# Windows and parts


@given(seed=seeds)
def test_the_windows_of_an_epoch_are_shuffled_differently(seed: int) -> None:
    lengths, groups = ragged(candidates=1)
    plans = [
        {
            frozenset(rows)
            for rows in listed(plan_window(lengths, groups, batch_size=4, seed=seed, epoch=1, window=window))
        }
        for window in (0, 1)
    ]
    assert len(plans[0] & plans[1]) < 30  # of 300 steps


@given(examples=lengths_and_groups(), budget=st.integers(1, 2000))
def test_a_step_is_cut_into_as_few_parts_as_fit(examples: Examples, budget: int) -> None:
    lengths, _ = examples
    parts = plan_parts(lengths, max_batch_tokens=budget)
    assert sorted(int(row) for part in parts for row in part.rows) == list(range(len(lengths)))
    assert len(parts) <= len(plan_batches(lengths, max_batch_tokens=budget))
    assert all(part.padded_tokens <= budget for part in parts if len(part.rows) > 1)


def test_the_parts_of_a_step_have_about_one_size() -> None:
    lengths = np.random.default_rng(0).integers(20, 100, 128)
    sizes = [part.padded_tokens for part in plan_parts(lengths, max_batch_tokens=4096)]
    assert max(sizes) < 1.1 * min(sizes)


@given(examples=lengths_and_groups(), processes=st.integers(1, 9))
def test_every_part_is_dealt_out_once_with_its_number(examples: Examples, processes: int) -> None:
    parts = plan_parts(examples[0], max_batch_tokens=900)
    shares = [share_of(parts, process, processes) for process in range(processes)]
    assert sorted(number for share in shares for number, _ in share) == list(range(len(parts)))
    assert all(parts[number] is part for share in shares for number, part in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_every_part_of_every_step_has_random_numbers_of_its_own() -> None:
    found = [seed_of(seed, step, number) for seed in range(3) for step in range(20) for number in range(5)]
    assert len(set(found)) == len(found)
    assert all(0 <= each < 2**63 for each in found)  # what torch.manual_seed takes
