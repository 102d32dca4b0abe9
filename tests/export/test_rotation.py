"""Rotated activations: the same products, with no channel far above the others."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import hadamard

from cappy_export.precisions.calibration import Activations
from cappy_export.precisions.rotation import Rotation, rotation_for


def rotated(rotation: Rotation, x: np.ndarray) -> np.ndarray:
    """What the graph does with an input (tokens, inputs)."""
    block = len(rotation.matrix)
    turned: np.ndarray = (((x - rotation.mean) / rotation.factors).reshape(-1, block) @ rotation.matrix).reshape(
        x.shape
    )
    return turned


def some_rotation(random: np.random.Generator, inputs: int) -> Rotation:
    mean = random.standard_normal(inputs).astype(np.float32)
    return Rotation(random.uniform(0.1, 10, inputs).astype(np.float32), mean)


@pytest.mark.parametrize("inputs", [1, 24, 64, 100, 256])
def test_the_product_is_the_same_but_for_the_mean_s(inputs: int) -> None:
    random = np.random.default_rng(inputs)
    x, weights = random.standard_normal((7, inputs)), random.standard_normal((inputs, 5)).astype(np.float32)
    rotation = some_rotation(random, inputs)
    found = rotated(rotation, x) @ rotation.of_weights(weights) + rotation.mean @ weights
    np.testing.assert_allclose(found, x @ weights, atol=1e-3)


def test_factors_and_offsets_of_the_operator_hold_the_matrix_s_scale_too() -> None:
    random = np.random.default_rng(0)
    rotation = some_rotation(random, 96)
    x = random.standard_normal((3, 96)).astype(np.float32)
    turned = ((x * rotation.inverse_factors + rotation.offsets).reshape(-1, 32) @ hadamard(32)).reshape(x.shape)
    np.testing.assert_allclose(turned, rotated(rotation, x), atol=1e-4)


@pytest.mark.parametrize(("inputs", "block"), [(1, 1), (24, 8), (100, 4), (256, 64), (1024, 64)])
def test_blocks_are_hadamard_matrices_that_fit(inputs: int, block: int) -> None:
    matrix = Rotation(np.ones(inputs, np.float32), np.zeros(inputs, np.float32)).matrix
    np.testing.assert_allclose(matrix, hadamard(block) / np.sqrt(block), atol=1e-6)


def test_moments_are_those_of_what_is_rotated_with_its_mean() -> None:
    random = np.random.default_rng(0)
    x = (random.standard_normal((50, 24)) + 1).astype(np.float32)
    rotation = some_rotation(random, 24)
    turned = rotated(rotation, x + rotation.mean)
    moments: np.ndarray = (x.T @ x / 50).astype(np.float32)
    np.testing.assert_allclose(rotation.of_moments(moments), turned.T @ turned / 50, rtol=1e-3, atol=1e-3)


def test_what_is_large_is_spread_over_its_block() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((500, 64)).astype(np.float32)
    x[:, 3] *= 30
    activations = Activations(x.mean(axis=0), np.cov(x, rowvar=False, bias=True).astype(np.float32))
    rotation = rotation_for(activations, [random.standard_normal((64, n)).astype(np.float32) for n in (8, 16)])
    assert rotation.factors[3] == pytest.approx(rotation.factors.max())
    turned = rotated(rotation, x)
    peaks = [(np.abs(rows).max(axis=1) / np.sqrt((rows**2).mean(axis=1))).mean() for rows in (x, turned)]
    assert peaks[1] < peaks[0] / 2
