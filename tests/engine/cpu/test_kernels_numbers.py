"""The native kernels give what numpy gives, with each instruction set that this processor has."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.native import reference
from cappy_engine.native.build import SOURCES
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import Bytes, Floats, Layer, Rotation, Rounding
from tests.engine.cpu.conftest import SETS

CLOSE = 1e-5
ODD = (0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-38, 3.4e38, -3.4e38)
"""What a broken model's activations may hold."""
shapes = st.tuples(st.integers(1, 600), st.integers(1, 150), st.integers(1, 100))
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)
roundings = st.sampled_from(
    [Rounding(), Rounding(zero_point=16, steps=239, least=2.5), Rounding(zero_point=0, steps=255)]
)


def layer_of(seed: int, shape: tuple[int, int, int], largest: int) -> tuple[Layer, Bytes, Floats, Floats]:
    """Make a linear layer with weights up to `largest`, rows for it, their scales and a residual."""
    rows, inner, columns = shape
    random = np.random.default_rng(seed)
    weights = random.integers(-largest, largest + 1, (inner, columns)).astype(np.int8)
    values = random.choice(np.array([0, 255, 128, 7, 200], np.uint8), (rows, inner))
    scales, column_scales = random.uniform(0.001, 0.1, (rows, 1)), random.uniform(1e-4, 1e-2, columns)
    bias, residual = random.standard_normal(columns), random.standard_normal((rows, columns))
    layer = Layer(weights, column_scales.astype(np.float32), bias.astype(np.float32))
    return layer, values, scales.astype(np.float32), residual.astype(np.float32)


def distance(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found - wanted).max() / max(1.0, float(np.abs(wanted).max())))


def unturned(columns: int) -> Rotation:
    """A rotation that leaves rows as they are."""
    return Rotation(np.ones(columns, np.float32), np.zeros(columns, np.float32), 1)


def test_every_set_of_the_library_is_tested() -> None:
    """Those that this processor has not, too."""
    known = re.findall(r'^    {"(\w+)", ', (SOURCES / "kernels.cpp").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted({*known}) == sorted(SETS)


@few
@given(seed=seeds, shape=shapes, rounding=roundings)
def test_rows_are_rounded_to_the_same_bytes_and_scales(
    library: NativeLibrary, instruction_set: str, seed: int, shape: tuple[int, int, int], rounding: Rounding
) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_normal(shape[:2]) * 10.0 ** random.integers(-20, 20, (shape[0], 1))).astype(np.float32)
    x[random.random(shape[0]) < 0.1] = 0
    found = library.quantize_rows(instruction_set, x, rounding, unturned(shape[1]))
    wanted = reference.quantize_rows(x, rounding)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])


@few
@given(seed=seeds, width=st.integers(1, 70), rounding=roundings)
def test_what_is_not_finite_shows_in_the_scale_of_its_row_and_in_no_other(
    library: NativeLibrary, instruction_set: str, seed: int, width: int, rounding: Rounding
) -> None:
    random = np.random.default_rng(seed)
    x = random.choice(np.array([*ODD, 1.5, -2.5], np.float32), (20, width))
    x[::2] = random.standard_normal((10, width))
    found = library.quantize_rows(instruction_set, x, rounding, unturned(width))
    wanted = reference.quantize_rows(x, rounding)
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(found[0], wanted[0])
    assert np.isfinite(found[1][::2]).all()


@few
@given(
    seed=seeds,
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    block=st.sampled_from([2**n for n in range(12)]),
    rounding=roundings,
)
def test_rotated_rows_are_rounded_to_the_same_bytes_and_scales(
    library: NativeLibrary, instruction_set: str, seed: int, rows: int, blocks: int, block: int, rounding: Rounding
) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((rows, blocks * block)) * 10.0 ** random.integers(-20, 20, (rows, 1))).astype(
        np.float32
    )
    x[random.random(x.shape) < 0.001] = random.choice(np.array(ODD, np.float32))
    factors, offsets = random.uniform(0.1, 10, (2, blocks * block)).astype(np.float32)
    rotation = Rotation(factors, offsets, block)
    found = library.quantize_rows(instruction_set, x, rounding, rotation)
    wanted = reference.quantize_rows(reference.rotate_rows(x, rotation), rounding)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize("block", [1, 2, 64, 256])
def test_a_rotation_in_steps_is_the_product_with_a_hadamard_matrix(block: int) -> None:
    x = np.random.default_rng(block).standard_normal((3, 256)).astype(np.float32)
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    factors, offsets = np.linspace(0.5, 2, 256, dtype=np.float32), np.linspace(-1, 1, 256, dtype=np.float32)
    wanted = ((x * factors + offsets).reshape(-1, block) @ matrix).reshape(3, 256)
    np.testing.assert_allclose(reference.rotate_rows(x, Rotation(factors, offsets, block)), wanted, atol=1e-4)


@few
@given(seed=seeds, shape=shapes, largest=st.sampled_from([64, 127]), zero_point=st.sampled_from([0, 16, 128, 255]))
def test_products_are_equal_to_the_last_bit(
    library: NativeLibrary, instruction_set: str, seed: int, shape: tuple[int, int, int], largest: int, zero_point: int
) -> None:
    """Weights of at most 64 cannot saturate in pairs of 16 bits, those of 127 can."""
    layer, values, scales, residual = layer_of(seed, shape, largest)
    layer = replace(layer, zero_point=zero_point)
    for added in (None, residual):
        found = library.linear(instruction_set, layer, values, scales, added)
        np.testing.assert_array_equal(found, reference.linear(layer, values, scales, added))


@pytest.mark.parametrize("shape", [(1, 2048, 16), (13, 2048, 50), (40, 4096, 112), (300, 1024, 33), (25, 8191, 20)])
def test_products_of_long_rows_are_equal_too(
    library: NativeLibrary, instruction_set: str, shape: tuple[int, int, int]
) -> None:
    """Rows of a multiple of 2048 are copied first; many rows are split into parts."""
    layer, values, scales, _ = layer_of(1, shape, 127)
    found = library.linear(instruction_set, layer, values, scales)
    np.testing.assert_array_equal(found, reference.linear(layer, values, scales))


@few
@given(seed=seeds, shape=shapes)
def test_gelu_and_layer_norm_are_near(
    library: NativeLibrary, instruction_set: str, seed: int, shape: tuple[int, int, int]
) -> None:
    layer, values, scales, residual = layer_of(seed, shape, 127)
    gelu = replace(layer, is_gelu=True)
    found = library.linear(instruction_set, gelu, values, scales)
    assert distance(found, reference.linear(gelu, values, scales)) < CLOSE
    rows, inner, columns = shape  # few columns may be nearly equal, and their differences are then not exact
    layer, values, scales, residual = layer_of(seed, (rows, inner, columns + 16), 127)
    norm = replace(layer, gamma=layer.bias, beta=layer.scales)
    for added in (residual, None):
        found = library.linear(instruction_set, norm, values, scales, added)
        assert distance(found, reference.linear(norm, values, scales, added)) < CLOSE


def test_gelu_is_near_everywhere(library: NativeLibrary, instruction_set: str) -> None:
    """Its argument is the bias: the rows are zeros."""
    x = np.linspace(-12, 12, 20001, dtype=np.float32)
    layer = Layer(np.zeros((4, len(x)), np.int8), np.ones_like(x), x, is_gelu=True)
    found = library.linear(instruction_set, layer, np.zeros((1, 4), np.uint8), np.ones((1, 1), np.float32))
    wanted = np.array([value * (1 + math.erf(value / 2**0.5)) / 2 for value in x.tolist()])
    assert np.abs(found[0] - wanted).max() < 1e-6


def test_gelu_of_large_values_is_the_value_or_nothing(library: NativeLibrary, instruction_set: str) -> None:
    large = np.array([5.4, 5.5, 5.6, 1e3, 1e6, 3e38, np.inf], np.float32)
    x = np.concatenate([large, -large, np.array([np.nan], np.float32)])
    layer = Layer(np.zeros((4, len(x)), np.int8), np.ones_like(x), x, is_gelu=True)
    found = library.linear(instruction_set, layer, np.zeros((1, 4), np.uint8), np.ones((1, 1), np.float32))
    np.testing.assert_allclose(found[0], [*large, *[0] * len(large), np.nan], atol=8e-7)


def test_weights_that_lie_as_the_kernels_read_them_give_the_same(library: NativeLibrary, instruction_set: str) -> None:
    layer, values, scales, _ = layer_of(2, (7, 64, 80), 127)  # 5 panels: the last block of two has one
    packed = replace(layer, weights=reference.pack(layer.weights))
    np.testing.assert_array_equal(reference.unpack(packed.weights), layer.weights)
    found = library.linear(instruction_set, packed, values, scales)
    np.testing.assert_array_equal(found, library.linear(instruction_set, layer, values, scales))


def test_rows_without_values_give_the_bias(library: NativeLibrary, instruction_set: str) -> None:
    layer, values, scales, _ = layer_of(4, (3, 0, 20), 127)
    found = library.linear(instruction_set, layer, values, scales)
    np.testing.assert_array_equal(found, np.broadcast_to(layer.bias, (3, 20)))


def test_a_scale_that_is_not_a_number_spoils_its_row_alone(library: NativeLibrary, instruction_set: str) -> None:
    layer, values, scales, residual = layer_of(3, (9, 20, 33), 64)
    scales[4] = np.nan
    for kind in (layer, replace(layer, is_gelu=True), replace(layer, gamma=layer.bias, beta=layer.bias)):
        found = library.linear(instruction_set, kind, values, scales, residual)
        assert np.isnan(found[4]).all()
        assert np.isfinite(np.delete(found, 4, axis=0)).all()
