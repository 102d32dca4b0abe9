"""What picks are worth: bounds, flips, and which examples are taken. The protocols' tests hold the figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, sem

from cappy_bench.quality.picking import (
    Average,
    Example,
    average_by_dataset,
    average_over_datasets,
    compare,
    count_ties,
    first_examples,
    wilson,
)


@given(st.integers(1, 3000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_bounds_are_wilsons(case: tuple[int, int]) -> None:
    right, count = case
    expected = binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_bounds_hold_the_mean_of_new_examples_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values = np.concatenate([draw.beta(2, 1, 60), draw.beta(1, 3, 60)])
        examples = [Example("a" if place < 60 else "b", (0,), (0.0,)) for place in range(120)]
        cell = average_over_datasets(examples, values)
        hits += cell.low <= (2 / 3 + 1 / 4) / 2 <= cell.high
    assert 0.92 <= hits / 400 <= 0.98


def coverage(truth: float, draw_once: Callable[[np.random.Generator], Average]) -> float:
    draw = np.random.default_rng(0)
    cells = [draw_once(draw) for _ in range(400)]
    return sum(cell.low <= truth <= cell.high for cell in cells) / len(cells)


def test_bounds_hold_where_the_templates_of_an_example_are_answered_alike() -> None:
    examples = [Example("RTE", (0,), (0.0,), cluster=str(place // 8)) for place in range(320)]

    def draw_once(draw: np.random.Generator) -> Average:
        values = (draw.random(320) < np.repeat(draw.beta(0.6, 0.4, 40), 8)).astype(float)
        return average_over_datasets(examples, values)

    assert 0.92 <= coverage(0.6, draw_once) <= 0.98


@pytest.mark.parametrize("truth", [0.05, 0.95], ids=["wrong", "right"])
def test_bounds_over_datasets_hold_for_few_examples_that_are_mostly_alike(truth: float) -> None:
    examples = [Example("abcd"[place // 10], (0,), (0.0,)) for place in range(40)]

    def draw_once(draw: np.random.Generator) -> Average:
        return average_over_datasets(examples, (draw.random(40) < truth).astype(float))

    assert coverage(truth, draw_once) >= 0.93


def test_the_bounds_of_the_mean_do_not_collapse_where_all_are_right() -> None:
    examples = [Example("RTE", (0,), (0.0,)) for _ in range(20)]
    mean = average_over_datasets(examples, np.ones(20))
    assert mean == average_by_dataset(examples, np.ones(20))["RTE"]
    assert (mean.low, mean.high) == pytest.approx(wilson(20, 20))


@pytest.mark.parametrize("last", [[1.0, 0.0], [1.0, 1.0]], ids=["all alike", "one of all right answers"])
def test_clusters_that_differ_less_than_their_examples_count_as_these(last: list[float]) -> None:
    examples = [Example("RTE", (0,), (0.0,), cluster=str(place // 2)) for place in range(20)]
    values = np.array([1.0, 0.0] * 9 + last)
    cell = average_by_dataset(examples, values)["RTE"]
    assert (cell.low, cell.high) == pytest.approx(wilson(values.sum(), 20))


def test_templates_of_one_example_that_agree_count_as_one() -> None:
    examples = [Example("RTE", (0,), (0.0,), cluster="7") for _ in range(9)]
    cell = average_by_dataset(examples, np.ones(9))["RTE"]
    assert (cell.count, cell.low, cell.high) == pytest.approx((9, *wilson(1, 1)))


def test_bounds_over_datasets_are_those_of_the_mean_of_independent_means() -> None:
    draw = np.random.default_rng(0)
    parts = {"a": draw.beta(2, 2, 50), "b": draw.beta(2, 2, 200), "c": draw.beta(2, 2, 100)}
    examples = [Example(dataset, (0,), (0.0,)) for dataset, values in parts.items() for _ in values]
    found = average_over_datasets(examples, np.concatenate(list(parts.values())))
    mean = np.mean([values.mean() for values in parts.values()])
    error = np.sqrt(sum(sem(values) ** 2 for values in parts.values())) / 3
    assert (found.low, found.mean, found.high) == pytest.approx(
        (mean - 1.959964 * error, mean, mean + 1.959964 * error)
    )


def test_one_example_has_no_bounds_of_its_own() -> None:
    cell = average_over_datasets([Example("a", (0,), (0.0,))], np.array([0.4]))
    assert (cell.low, cell.mean, cell.high) == (0.0, 0.4, 1.0)


def test_differences_may_be_below_0_though_none_was_seen() -> None:
    values = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    found = average_over_datasets([Example("a", (0,), (0.0,))] * 5, values, least=-1.0)
    expected = norm.interval(0.95, values.mean(), sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-6)
    assert found.low < 0


def test_the_first_examples_are_taken_with_all_their_templates() -> None:
    examples = [Example("RTE", (place,), (0.0,), cluster=str(place % 3)) for place in range(6)]
    _, found = first_examples([("q", str(place)) for place in range(6)], examples, 2)
    assert [example.cluster for example in found] == ["0", "1", "0", "1"]


def test_flips_are_counted_in_both_directions_with_their_margin() -> None:
    examples = [
        Example("RTE", (0, 1), (1.0, 0.0), name="GPT-3 style, 17"),
        Example("RTE", (2, 3), (0.0, 1.0)),
        Example("CB", (4, 5), (0.0, 0.0)),
        Example("CB", (6, 7), (1.0, 0.0)),
    ]
    first = np.array([0.9, 0.2, 0.6, 0.5, 0.4, 0.1, 0.8, 0.1], np.float32)
    second = np.array([0.1, 0.2, 0.4, 0.5, 0.0, 0.1, 0.8, 0.1], np.float32)
    found = compare(examples, first, second)
    assert found.share == 0.25
    assert [(flip.dataset, flip.gain) for flip in found.flips] == [("RTE", 1.0), ("CB", 0.0), ("RTE", -1.0)]
    assert found.flips[-1].name == "GPT-3 style, 17"
    assert [flip.margin for flip in found.flips] == pytest.approx([0.1, 0.3, 0.7], abs=1e-6)
    assert compare(examples, first, first).share == 1


@pytest.mark.parametrize(
    ("scores", "count"), [([0.5, 0.5, 0.1], 1), ([0.5, 0.4999, 0.1], 0), ([0.1, 0.5, 0.5], 0), ([0.9, 0.5, 0.5], 0)]
)
def test_a_tie_is_of_equal_best_scores_and_unequal_worths(scores: list[float], count: int) -> None:
    assert count_ties([Example("RTE", (0, 1, 2), (1.0, 0.0, 0.0))], np.array(scores)) == count
