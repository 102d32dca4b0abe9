"""Weights in 8 bits: how far they are from what they were, alone and together, and that no CPU saturates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cappy_export.precisions.rounding import DAMPING, compensate_weights, quantize_weights

weights_of_any_shape = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(-1e4, 1e4, width=32)
)


@pytest.mark.slow
@settings(max_examples=200)
@given(weights=weights_of_any_shape)
def test_weights_come_back_to_half_a_step_and_no_pair_saturates(weights: np.ndarray) -> None:
    steps, scales = quantize_weights(weights)
    assert steps.dtype == np.int8
    assert scales.dtype == np.float32
    assert scales.shape == weights.shape[1:]
    error = np.abs(steps * scales.astype(np.float64) - weights)
    assert (error <= 0.5 * scales * (1 + 1e-4)).all()
    require_no_saturation(steps)


def require_no_saturation(steps: np.ndarray) -> None:
    """No sum of two products leaves 16 bits, of inputs 0 and 1, 2 and 3, and so on."""
    whole = steps.astype(np.int64)
    assert np.abs(whole).max() <= 127
    first, second = whole[:-1:2], whole[1::2]
    worst = 255 * np.where(first * second > 0, np.abs(first + second), np.maximum(np.abs(first), np.abs(second)))
    assert (worst <= np.iinfo(np.int16).max).all()
    sums = 255 * first + 255 * second  # what a kernel adds in 16 bits where all activations are the largest
    assert (sums == sums.astype(np.int16)).all()


def test_pairs_that_are_equal_have_64_steps_and_one_row_all_127() -> None:
    steps, _ = quantize_weights(np.ones((4, 1), np.float32))
    assert set(steps.ravel().tolist()) <= {63, 64}
    steps, _ = quantize_weights(np.array([[1.0, -2.0, 0.0]], np.float32))
    assert steps.tolist() == [[127, -127, 0]]
    steps, _ = quantize_weights(np.array([[1.0], [-1.0], [1.0]], np.float32))
    assert steps.ravel().tolist() == [127, -127, 127]
    steps, _ = quantize_weights(np.array([[0.0], [1.0], [1.0], [0.0]], np.float32))
    assert steps.ravel().tolist() == [0, 127, 127, 0]  # of two pairs


def correlated_inputs(seed: int, tokens: int, inputs: int) -> np.ndarray:
    """(tokens, inputs): a few directions carry most of what varies, as in a trained network."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((tokens, 3)) @ random.standard_normal((3, inputs))
    made: np.ndarray = (common + 0.2 * random.standard_normal((tokens, inputs))).astype(np.float32)
    return made


@settings(max_examples=100)
@given(weights=weights_of_any_shape, seed=st.integers(0, 1000))
def test_no_compensated_pair_saturates(weights: np.ndarray, seed: int) -> None:
    x = correlated_inputs(seed, 50, len(weights))
    steps, scales = compensate_weights(weights, x.T @ x / 50)
    assert steps.dtype == np.int8
    np.testing.assert_array_equal(scales, quantize_weights(weights)[1])
    require_no_saturation(steps)


def test_no_compensated_pair_saturates_however_many_there_are() -> None:
    x = correlated_inputs(0, 600, 200)
    weights = np.random.default_rng(1).uniform(-1, 1, (200, 64)).astype(np.float32)
    require_no_saturation(compensate_weights(weights, x.T @ x / 600)[0])


@pytest.mark.parametrize("moments", [np.eye(150, dtype=np.float32), np.zeros((150, 150), np.float32)], ids=["1", "0"])
def test_inputs_that_are_not_correlated_compensate_for_nothing(moments: np.ndarray) -> None:
    weights = np.random.default_rng(0).standard_normal((150, 8)).astype(np.float32)
    np.testing.assert_array_equal(compensate_weights(weights, moments)[0], quantize_weights(weights)[0])


def test_compensation_is_gptq_s() -> None:
    """The same steps as by its own equations, with the inverse of the moments, one input after the other."""
    x, random = correlated_inputs(0, 300, 40), np.random.default_rng(1)
    weights = random.standard_normal((40, 8)).astype(np.float32)
    weights[1::2] *= -np.sign(weights[1::2]) * np.sign(weights[::2])  # no pair of one sign, so no weight is cut
    moments = x.T @ x / np.float32(300)
    found, scales = compensate_weights(weights, moments)
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments[np.ix_(order, order)] + DAMPING * np.diag(moments).mean() * np.eye(40)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, wanted = weights[order].astype(np.float64), np.zeros((40, 8))
    for place in range(40):
        wanted[order[place]] = np.clip(np.rint(left[place] / scales), -127, 127)
        error = (left[place] - wanted[order[place]] * scales) / inverse[place, place]
        left[place:] -= inverse[place, place:, None] * error
    assert (found == wanted).mean() > 0.99  # but for what lies between two steps


def test_compensated_weights_give_products_that_are_much_closer() -> None:
    x = correlated_inputs(0, 600, 192)
    weights = np.random.default_rng(1).standard_normal((192, 64)).astype(np.float32)
    errors = [
        np.linalg.norm(x @ (steps * scales) - x @ weights)
        for steps, scales in (quantize_weights(weights), compensate_weights(weights, x.T @ x / 600))
    ]
    assert errors[1] < errors[0] / 2
