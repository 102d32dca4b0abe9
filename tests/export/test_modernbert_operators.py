"""The operators that ModernBERT needs: the same with kernels and without."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from scipy.special import erf

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


def test_what_cannot_be_halved_or_turned_is_refused(options: onnxruntime.SessionOptions) -> None:
    with pytest.raises(Exception, match="GeGlu takes rows of two halves"):
        run_node(
            helper.make_node("GeGlu", ["x"], ["y"], domain=DOMAIN), {"x": np.ones((2, 3), np.float32)}, {}, options
        )
    given = {"packed": np.ones((4, 24), np.float32), "lengths": np.array([4])}
    for angles, said in (((9, 3), "not those of heads of 4 values"), ((3, 2), "4 tokens, and there are angles for 3")):
        turned = {"cosines": np.ones(angles, np.float32), "sines": np.zeros(angles, np.float32)}
        with pytest.raises(Exception, match=said):
            computed("RotaryAttention", {**given, **turned}, 2, options)
