"""What goes wrong in some shapes, or with some values only, is noticed when the library is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cappy_engine.cpu.kernels import self_test
from cappy_engine.native.library import NativeLibrary
from cappy_engine.native.operands import Floats, Layer, Norm, Rotation


def spoil(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, what: str, change: Callable[..., Any]) -> str:
    """Change what a function returns; returns the problem that the test finds."""
    right = getattr(library, what)
    monkeypatch.setattr(library, what, lambda *given, **others: change(right(*given, **others), *given[1:], **others))
    return self_test(library, library.instruction_sets[0])


def with_last(found: Floats, is_wrong: object) -> Floats:
    """Change the last value, if it is wrong."""
    found[-1, -1] += bool(is_wrong)
    return found


@pytest.mark.parametrize("count", range(1, 13))
def test_each_count_of_rows(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    def linear(found: Floats, _: Layer, rows: Any, *__: Any) -> Floats:
        return with_last(found, len(rows) == count)

    def bf16(found: Floats, _: Any, x: Floats, *__: Any) -> Floats:
        return with_last(found, len(x) == count)

    def attention(found: Floats, _: Floats, lengths: Any, *__: Any) -> Floats:
        end = int(np.cumsum(lengths)[list(lengths).index(count)]) if count in lengths else 0
        found[:end][-1:] += 1
        return found

    for what, change in (("linear", linear), ("bf16_linear", bf16), ("attention", attention)):
        with monkeypatch.context() as patched:
            assert "differs from numpy" in spoil(library, patched, what, change)


@pytest.mark.parametrize(
    "is_wrong",
    [
        lambda layer: layer.is_packed,
        lambda layer: layer.inner % 4 == 3,
        lambda layer: layer.columns % 8,
        lambda layer: layer.gamma is not None and layer.columns == 96,
    ],
    ids=["packed", "rows that end anywhere", "columns that end anywhere", "parts of rows and columns"],
)
def test_each_kind_of_product(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, is_wrong: Callable[[Layer], bool]
) -> None:
    problem = spoil(library, monkeypatch, "linear", lambda found, layer, *_: with_last(found, is_wrong(layer)))
    assert "differs from numpy" in problem


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_that_saturates_just_so(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    def saturated(found: Floats, layer: Layer, rows: Any, scales: Floats, *_: Any) -> Floats:
        """Lose what is above 16 bits: 129 times 255 is 128 more."""
        if layer.is_packed and abs(layer.weights).max() == 65 and layer.weights.max() == (65 if sign > 0 else 63):
            found[0, -1] -= sign * 128 * layer.scales[-1] * scales[0, 0]
        return found

    assert spoil(library, monkeypatch, "linear", saturated) == "Linear differs from numpy, 2 rows"


@pytest.mark.parametrize("what", ["linear", "bf16_linear", "gate_rows", "attention", "first_attention"])
def test_what_is_not_a_number_may_not_be_lost(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert "differs from numpy" in spoil(library, monkeypatch, what, lambda found, *_, **__: np.nan_to_num(found))


@pytest.mark.parametrize("block", [1, 8, 16, 32, 64])
def test_each_size_of_rotated_blocks(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    def turned(found: Any, _: Floats, __: Any, rotation: Rotation, *___: Any, **____: Any) -> Any:
        return found[0] ^ (rotation.block == block), found[1]

    assert "RotatedRows differs" in spoil(library, monkeypatch, "quantize_rows", turned)


def test_epsilon_counts(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = library.quantize_rows

    def small(name: str, x: Floats, rounding: Any, rotation: Any, norm: Norm | None = None, **others: Any) -> Any:
        given = norm and Norm(norm.gamma, norm.beta, epsilon=1e-5)
        return right(name, x, rounding, rotation, given, **others)

    monkeypatch.setattr(library, "quantize_rows", small)
    assert self_test(library, library.instruction_sets[0]).startswith("QuantizeNormedRows differs from numpy")


@pytest.mark.parametrize("kind", ["window", "distances", "angles"])
def test_long_pairs_of_each_kind(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def wrong(
        found: Floats, _: Any, lengths: Any, __: int, window: Any = None, distances: Any = None, angles: Any = None
    ) -> Floats:
        """Attend wrongly at the end of what is longer than a block of queries."""
        how = {"window": window, "distances": distances, "angles": angles}
        return with_last(found, lengths[-1] > 64 and how[kind] is not None)

    assert "Attention differs from numpy" in spoil(library, monkeypatch, "attention", wrong)
