"""What picks are worth: bounds, flips, and which examples are taken. The protocols' tests hold the figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from cappy_engine.picking import Example, average_over_datasets, compare, wilson


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


def test_flips_are_counted_in_both_directions_with_their_margin() -> None:
    examples = [
        Example("RTE", (0, 1), (1.0, 0.0)),
        Example("RTE", (2, 3), (0.0, 1.0)),
        Example("CB", (4, 5), (0.0, 0.0)),
        Example("CB", (6, 7), (1.0, 0.0)),
    ]
    first = np.array([0.9, 0.2, 0.6, 0.5, 0.4, 0.1, 0.8, 0.1], np.float32)
    second = np.array([0.1, 0.2, 0.4, 0.5, 0.0, 0.1, 0.8, 0.1], np.float32)
    found = compare(examples, first, second)
    assert found.share == 0.25
    assert [(flip.dataset, flip.gain) for flip in found.flips] == [("RTE", 1.0), ("CB", 0.0), ("RTE", -1.0)]
    assert [flip.margin for flip in found.flips] == pytest.approx([0.1, 0.3, 0.7], abs=1e-6)
    assert compare(examples, first, first).share == 1
