"""Products of bfloat16 give what numpy gives, with each instruction set that this processor has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.cpu.cores import cpu_flags
from cappy_engine.native import reference
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import BF16_GROUP, Bf16Layer, Floats

CLOSE = 2e-5
"""Sums are taken in another order than numpy's."""
shapes = st.tuples(st.integers(1, 600), st.integers(1, 70), st.integers(1, 7))
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


def layer_of(seed: int, shape: tuple[int, int, int]) -> tuple[Bf16Layer, Floats, Floats]:
    """Make a layer, rows and a residual, for so many rows, pairs of inputs and panels of columns."""
    rows, inner, columns = shape[0], shape[1] * 2, shape[2] * 16
    random = np.random.default_rng(seed)
    weights = reference.bf16_bits(random.standard_normal((inner, columns)).astype(np.float32))
    x, bias = random.standard_normal((rows, inner)), random.standard_normal(columns)
    layer = Bf16Layer(reference.pack(weights, BF16_GROUP), bias.astype(np.float32))
    residual = random.standard_normal((rows, columns)).astype(np.float32)
    return layer, x.astype(np.float32), residual


def distance(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found - wanted).max() / max(1.0, float(np.abs(wanted).max())))


@few
@given(seed=seeds, shape=shapes, behind=st.sampled_from(["", "residual", "norm", "residual and norm"]))
def test_a_product_is_that_of_rounded_rows(
    library: NativeLibrary, instruction_set: str, seed: int, shape: tuple[int, int, int], behind: str
) -> None:
    layer, x, residual = layer_of(seed, shape)
    if "norm" in behind:
        gamma, beta = np.random.default_rng(seed + 1).standard_normal((2, shape[2] * 16)).astype(np.float32)
        layer = Bf16Layer(layer.weights, layer.bias, gamma=gamma, beta=beta)
    added = residual if "residual" in behind else None
    found = library.bf16_linear(instruction_set, layer, x, added)
    wanted = reference.bf16_linear(layer, x, added)
    assert distance(found, wanted) < CLOSE
    plain = x @ reference.bf16_values(reference.unpack(layer.weights)) + layer.bias
    assert behind or distance(found, plain) > 0, "the rows were not rounded"


@few
@given(seed=seeds, shape=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 3)))
def test_gelu_follows(library: NativeLibrary, instruction_set: str, seed: int, shape: tuple[int, int, int]) -> None:
    layer, x, _ = layer_of(seed, shape)
    layer = Bf16Layer(layer.weights, layer.bias, is_gelu=True)
    assert distance(library.bf16_linear(instruction_set, layer, x), reference.bf16_linear(layer, x)) < CLOSE


@few
@given(seed=seeds, odd=st.sampled_from([np.nan, np.inf, -np.inf, 3.4e38]))
def test_what_is_not_finite_stays_in_its_row(
    library: NativeLibrary, instruction_set: str, seed: int, odd: float
) -> None:
    layer, x, _ = layer_of(seed, (20, 20, 2))
    place = np.random.default_rng(seed).integers(40)
    x[::2, place] = odd
    found, wanted = library.bf16_linear(instruction_set, layer, x), reference.bf16_linear(layer, x)
    assert not np.isfinite(found[::2]).any()
    assert np.isnan(found[::2]).tolist() == np.isnan(wanted[::2]).tolist()
    assert distance(found[1::2], wanted[1::2]) < CLOSE


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1.00390625, 1.0), (1.01171875, 1.015625), (-0.3, -0.30078125), (3.4e38, np.inf), (-np.inf, -np.inf), (0.0, 0.0)],
)
def test_a_value_is_rounded_half_to_even(
    library: NativeLibrary, instruction_set: str, value: float, rounded: float
) -> None:
    ones = np.zeros((2, 16), np.float32)
    ones[0] = 1
    layer = Bf16Layer(reference.pack(reference.bf16_bits(ones), BF16_GROUP), np.zeros(16, np.float32))
    found = library.bf16_linear(instruction_set, layer, np.array([[value, 0]], np.float32))
    assert found.tolist() == [[rounded] * 16]
    assert reference.bf16_values(reference.bf16_bits(np.array([value], np.float32))).tolist() == [rounded]


def test_a_set_that_multiplies_bf16_wrongly_is_not_used(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cappy_engine.cpu.kernels import self_test

    right = library.bf16_linear
    monkeypatch.setattr(library, "bf16_linear", lambda *given: right(*given) * np.float32(1.0001))
    problem = self_test(library, library.instruction_sets[0])
    assert problem.startswith("Bf16Linear differs from numpy")


def test_bf16_is_multiplied_as_such_where_that_is_faster(library: NativeLibrary) -> None:
    flags, cpuinfo = cpu_flags(), Path("/proc/cpuinfo")
    if "avx512_bf16" not in flags:
        pytest.skip("this processor has no AVX512-BF16")
    is_made_for_amx = "GenuineIntel" in cpuinfo.read_text() and "avx512_fp16" in flags
    order = [name for name in library.instruction_sets if name in ("avx512", "avx512bf16")]
    assert order == (["avx512", "avx512bf16"] if is_made_for_amx else ["avx512bf16", "avx512"])
