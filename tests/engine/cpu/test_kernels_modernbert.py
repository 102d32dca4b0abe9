"""What ModernBERT's kernels add: rotary positions, gates, and norms of what a layer reads; each set beside numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cappy_engine.cpu import kernels
from cappy_engine.native import reference
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import Angles, Floats, Norm, Rotation, Rounding

CLOSE = 1e-5


def angles_of(places: int, head_size: int) -> Angles:
    """Make the angles of rotary positions, as RoFormer has them."""
    half = head_size // 2
    radians = np.arange(places)[:, None] / 10000.0 ** (np.arange(half) / max(half, 1))
    return np.cos(radians).astype(np.float32), np.sin(radians).astype(np.float32)


def rows_of(tokens: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=5),
    heads=st.integers(1, 4),
    half=st.sampled_from((16, 32)) | st.integers(1, 65),
    window=st.none() | st.integers(0, 80),
    seed=st.integers(0, 1000),
)
@example(lengths=[512], heads=2, half=32, window=None, seed=0)
@example(lengths=[513, 1], heads=1, half=16, window=None, seed=0)
@example(lengths=[900], heads=1, half=32, window=64, seed=0)
@example(lengths=[1500], heads=1, half=8, window=600, seed=0)
@example(lengths=[70, 3], heads=1, half=256, window=None, seed=0)
@example(lengths=[40], heads=2, half=257, window=9, seed=0)
def test_queries_and_keys_are_turned_by_their_places(
    library: NativeLibrary, lengths: list[int], heads: int, half: int, window: int | None, seed: int
) -> None:
    given_lengths, hidden = np.array(lengths), 2 * half * heads
    packed, angles = rows_of(sum(lengths), 3 * hidden, seed), angles_of(max(lengths), 2 * half)
    wanted = reference.attention(packed, given_lengths, heads, window, angles=angles)
    firsts = np.cumsum(given_lengths) - given_lengths
    for name in library.instruction_sets:
        found = library.attention(name, packed, given_lengths, heads, window, angles=angles)
        np.testing.assert_allclose(found, wanted, rtol=CLOSE, atol=CLOSE, err_msg=name)
        if window is None and min(lengths) > 0:
            queries, rest = packed[firsts, :hidden], packed[:, hidden:]
            found = library.first_attention(name, queries, rest, given_lengths, heads, angles=angles)
            np.testing.assert_allclose(found, wanted[firsts], rtol=CLOSE, atol=CLOSE, err_msg=name)


def test_what_counts_is_how_far_tokens_are_apart(library: NativeLibrary, instruction_set: str) -> None:
    """The reference cannot show this: it turns as the kernels do."""
    packed, lengths = rows_of(60, 3 * 64), np.array([60])
    cosines, sines = angles_of(100, 64)
    found, moved = (
        library.attention(instruction_set, packed, lengths, 1, angles=(cosines[by:], sines[by:])) for by in (0, 40)
    )
    np.testing.assert_allclose(found, moved, rtol=1e-4, atol=1e-4)
    assert np.abs(found - library.attention(instruction_set, packed, lengths, 1)).max() > 0.1


def test_a_pair_gives_the_same_alone_and_in_company(library: NativeLibrary, instruction_set: str) -> None:
    lengths, angles = np.array([40, 150, 300]), angles_of(300, 32)
    packed = rows_of(490, 3 * 64)
    for window in (None, 20):
        alone = library.attention(instruction_set, packed[40:190], lengths[1:2], 2, window, angles=angles)
        together = library.attention(instruction_set, packed, lengths, 2, window, angles=angles)
        np.testing.assert_array_equal(together[40:190], alone)


def test_a_pair_that_is_longer_than_its_angles_is_refused(library: NativeLibrary, instruction_set: str) -> None:
    packed, lengths = rows_of(12, 3 * 8), np.array([5, 7])
    library.attention(instruction_set, packed, lengths, 1, angles=angles_of(7, 8))
    with pytest.raises(ValueError, match="there are no rows for their places"):
        library.attention(instruction_set, packed, lengths, 1, angles=angles_of(6, 8))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 300), count=st.integers(1, 150), seed=st.integers(0, 1000))
def test_gates_are_near(library: NativeLibrary, instruction_set: str, rows: int, count: int, seed: int) -> None:
    x = rows_of(rows, 2 * count, seed) * 3
    wanted = reference.gate_rows(x)
    np.testing.assert_allclose(library.gate_rows(instruction_set, x), wanted, rtol=CLOSE, atol=CLOSE)


def test_what_is_not_finite_stays_in_its_row(library: NativeLibrary, instruction_set: str) -> None:
    x = rows_of(3, 80)
    x[1, 3], x[1, 47] = np.inf, np.nan
    found = library.gate_rows(instruction_set, x)
    assert not np.isfinite(found[1, [3, 7]]).any()
    np.testing.assert_array_equal(np.isfinite(found).sum(axis=1), [40, 38, 40])


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 200), blocks=st.integers(1, 5), block=st.sampled_from([1, 4, 16, 64]), seed=st.integers(0, 1000)
)
@pytest.mark.parametrize("is_gated", [False, True])
def test_rows_that_are_normed_or_gated_first_are_rounded_to_bytes_that_are_at_most_1_apart(
    library: NativeLibrary, instruction_set: str, is_gated: bool, rows: int, blocks: int, block: int, seed: int
) -> None:
    """A Gelu and a layer norm are not equal to the last bit, so a value between two steps may become either."""
    columns = blocks * block
    gamma, beta = rows_of(2, columns, seed + 1)
    norm = None if is_gated else Norm(gamma, beta, epsilon=0.01)
    x = rows_of(rows, columns * (1 + is_gated), seed)
    factors, offsets = rows_of(2, columns, seed + 2)
    rotation = Rotation(factors, offsets, block)
    found = library.quantize_rows(instruction_set, x, Rounding(), rotation, norm, is_gated=is_gated)
    prepared = reference.normalize_rows(x, norm) if norm else reference.gate_rows(x)
    wanted = reference.quantize_rows(reference.rotate_rows(prepared, rotation), Rounding())
    apart = np.abs(found[0].astype(int) - wanted[0])
    assert apart.max(initial=0) <= 1
    assert apart.sum() <= 1 + 0.001 * apart.size
    np.testing.assert_allclose(found[1], wanted[1], rtol=CLOSE, atol=CLOSE / 127)


@pytest.mark.parametrize("wrong", ["attention", "gate_rows", "normalize_rows"])
def test_all_are_tested_before_they_are_used(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    right = getattr(reference, wrong)

    def other(*given: Any) -> Floats:
        """Turn the other way, or make less."""
        if wrong != "attention":
            return np.asarray(right(*given) * np.float32(0.9))
        *rest, angles = given
        return np.asarray(right(*rest, angles and (angles[0], -angles[1])))

    monkeypatch.setattr(reference, wrong, other)
    problem = kernels.self_test(library, library.instruction_sets[0])
    told = {"attention": "RotaryAttention", "gate_rows": "GeGlu", "normalize_rows": "QuantizeNormedRows"}
    assert problem.startswith(f"{told[wrong]} differs from numpy")
