"""The operators that ModernBERT needs: the same with kernels and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper
from scipy.linalg import hadamard
from scipy.special import erf

from cappy_engine.native.reference import bf16_bits, pack
from cappy_export.graphs.operators import DOMAIN
from tests.support.operators import attended, computed, kernel_options, run_node


@pytest.fixture
def options() -> onnxruntime.SessionOptions:
    return kernel_options()


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("lengths", [[5], [1], [3, 1, 6]], ids=str)
def test_rotary_attention_is_that_of_queries_and_keys_that_were_turned(
    lengths: list[int], has_kernels: bool, options: onnxruntime.SessionOptions
) -> None:
    random, chosen = np.random.default_rng(sum(lengths)), options if has_kernels else onnxruntime.SessionOptions()
    packed = random.standard_normal((sum(lengths), 3, 2, 4)).astype(np.float32)  # two heads of two points
    radians = random.uniform(0, 6, (7, 2)).astype(np.float32)
    places = np.concatenate([np.arange(length) for length in lengths])
    points = (packed[..., :2] + 1j * packed[..., 2:]) * np.exp(1j * radians[places])[:, None, None]
    turned = np.concatenate([points.real, points.imag], axis=-1)
    turned[:, 2] = packed[:, 2]
    given = {"lengths": np.array(lengths), "cosines": np.cos(radians), "sines": np.sin(radians)}
    inputs = {"packed": packed.reshape(-1, 24), **given}
    ends, flat = np.cumsum(lengths), turned.reshape(-1, 24)
    wanted = [attended(flat[end - length : end], 2) for length, end in zip(lengths, ends, strict=True)]
    np.testing.assert_allclose(computed("RotaryAttention", inputs, 2, chosen), np.concatenate(wanted), atol=1e-5)
    # Angle 0 of a place is 0 in every model; here it is not, and the first token's query is turned as well.
    first = {"queries": inputs["packed"][ends - lengths, :8], "packed": inputs["packed"][:, 8:], **given}
    found = computed("FirstRotaryAttention", first, 2, chosen)
    np.testing.assert_allclose(found, [rows[0] for rows in wanted], atol=1e-5)
    near = helper.make_node("LocalRotaryAttention", [*inputs], ["y"], domain=DOMAIN, heads=2, window=9)
    np.testing.assert_allclose(run_node(near, inputs, {}, chosen)[0], np.concatenate(wanted), atol=1e-5)


@pytest.mark.parametrize("before", [(), (2,), (2, 3), (0,)], ids=str)
def test_gates_may_have_any_dimensions_with_kernels_and_without(
    before: tuple[int, ...], options: onnxruntime.SessionOptions
) -> None:
    x = np.random.default_rng(1).standard_normal((*before, 10)).astype(np.float32)
    wanted = x[..., :5] * (1 + erf(x[..., :5] / 2**0.5)) / 2 * x[..., 5:]
    for chosen in (options, onnxruntime.SessionOptions()):
        (found,) = run_node(helper.make_node("GeGlu", ["x"], ["y"], domain=DOMAIN), {"x": x}, {}, chosen)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


ROUNDING: dict[str, Any] = {"zero_point": 128, "steps": 127, "least": 1e-12}
FACTORS = {"f": np.linspace(0.5, 2, 8, dtype=np.float32), "o": np.linspace(-1, 1, 8, dtype=np.float32)}
NORM = {"g": np.linspace(2, 1, 8, dtype=np.float32), "b": np.linspace(0, 1, 8, dtype=np.float32)}


@pytest.mark.parametrize("before", [(), (2,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("operator", ["QuantizeNormedRows", "QuantizeGatedRows"])
def test_rows_are_normed_or_gated_then_turned_and_rounded_with_kernels_and_without(
    operator: str, before: tuple[int, ...], options: onnxruntime.SessionOptions
) -> None:
    is_gated = operator == "QuantizeGatedRows"
    x = np.random.default_rng(2).standard_normal((*before, 16 if is_gated else 8)).astype(np.float32)
    if is_gated:
        prepared = x[..., :8] * (1 + erf(x[..., :8] / 2**0.5)) / 2 * x[..., 8:]
    else:
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + 0.25)
        prepared = (x - x.mean(axis=-1, keepdims=True)) / spread * NORM["g"] + NORM["b"]
    turned = ((prepared * FACTORS["f"] + FACTORS["o"]).reshape(-1, 4) @ hadamard(4)).reshape(*before, 8)
    constants = FACTORS if is_gated else {**NORM, **FACTORS}
    attributes = ROUNDING if is_gated else {**ROUNDING, "epsilon": 0.25}
    node = helper.make_node(operator, ["x", *constants], ["q", "s"], domain=DOMAIN, block=4, **attributes)
    for chosen in (options, onnxruntime.SessionOptions()):
        q, scale = run_node(node, {"x": x}, constants, chosen)
        assert (q.shape, scale.shape) == ((*before, 8), (*before, 1))
        np.testing.assert_allclose(scale, np.abs(turned).max(axis=-1, keepdims=True, initial=0) / 127, rtol=1e-5)
        assert (np.abs((q.astype(int) - 128) * scale - turned) <= scale * 0.501).all()


def test_bfloat16_products_add_a_residual_with_kernels_and_without(options: onnxruntime.SessionOptions) -> None:
    random = np.random.default_rng(3)
    x, residual = random.integers(-9, 9, (5, 8)), random.standard_normal((5, 16))
    weights = random.integers(-9, 9, (8, 16)).astype(np.float32)  # bfloat16 has all of these
    bits = pack(bf16_bits(weights), 2)
    stored = helper.make_tensor("w", TensorProto.BFLOAT16, bits.shape, bits.tobytes(), raw=True)
    node = helper.make_node("Bf16LinearAdd", ["x", "w", "b", "r"], ["y"], domain=DOMAIN)
    inputs = {"x": x.astype(np.float32), "r": residual.astype(np.float32)}
    for chosen in (options, onnxruntime.SessionOptions()):
        (found,) = run_node(node, inputs, {"b": np.ones(16, np.float32), "w": stored}, chosen)
        np.testing.assert_allclose(found, x @ weights + 1 + residual, rtol=1e-5)


def test_what_cannot_be_halved_or_turned_is_refused(options: onnxruntime.SessionOptions) -> None:
    with pytest.raises(Exception, match="GeGlu takes rows of two halves"):
        run_node(
            helper.make_node("GeGlu", ["x"], ["y"], domain=DOMAIN), {"x": np.ones((2, 3), np.float32)}, {}, options
        )
    gates = helper.make_node("QuantizeGatedRows", ["x", "f", "o"], ["q", "s"], domain=DOMAIN, block=4, **ROUNDING)
    for columns in (8, 15, 17):
        with pytest.raises(Exception, match=f"there are 8 factors for rows of {columns} values"):
            run_node(gates, {"x": np.ones((2, columns), np.float32)}, FACTORS, options)
    given = {"packed": np.ones((4, 24), np.float32), "lengths": np.array([4])}
    for angles, said in (((9, 3), "not those of heads of 4 values"), ((3, 2), "4 tokens, and there are angles for 3")):
        turned = {"cosines": np.ones(angles, np.float32), "sines": np.zeros(angles, np.float32)}
        with pytest.raises(Exception, match=said):
            computed("RotaryAttention", {**given, **turned}, 2, options)
