"""The queries' bias goes into their weights, and the scores stay PyTorch's; where it cannot, it is added."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cappy_export.graphs.cuda import find_entry
from tests.support.direct_graphs import random_inputs
from tests.support.gpu_graphs import ATOL, logits_of, opened, written
from tests.support.small_models import LONGEST, random_model, torch_logits


def query_operators(graph: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in graph.graph.node if node.name.endswith("attention/query")]


@pytest.mark.parametrize("shift", [0.0, 0.5, -3.0])
def test_the_bias_of_the_queries_is_in_their_weights(shift: float) -> None:
    model = random_model("roberta")
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            torch.nn.init.uniform_(parameter, *((0.5, 1.5) if name.endswith("weight") else (shift - 0.4, shift + 0.4)))
    graph = written("packed", model)
    assert query_operators(graph) == ["MatMul", "MatMul"]
    inputs = random_inputs(model, [LONGEST, 3, 20])
    np.testing.assert_allclose(logits_of(opened(graph), model, inputs), torch_logits(model, inputs), rtol=0, atol=ATOL)


@pytest.mark.parametrize(("scale", "shifts"), [(0.0, (0.5, 0.5)), (1e-3, (0.5, -0.5)), (1e-8, (0.0, 0.0))])
def test_where_rounding_would_spoil_it_the_bias_is_added(scale: float, shifts: tuple[float, float]) -> None:
    model = random_model("roberta")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter[3:5] = scale if name.endswith("weight") else torch.tensor(shifts)
    graph = written("packed", model)
    assert query_operators(graph) == ["Gemm", "Gemm"]
    inputs = random_inputs(model, [LONGEST, 3, 20])
    np.testing.assert_allclose(logits_of(opened(graph), model, inputs), torch_logits(model, inputs), rtol=0, atol=ATOL)


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(0.01, 4.0), st.floats(-2.0, 2.0), st.floats(-3.0, 3.0)), min_size=8, max_size=64))
def test_a_row_gives_1_for_every_token_behind_a_norm(values: list[tuple[float, float, float]]) -> None:
    scale, shift, z = (np.array(column, np.float32) for column in zip(*values, strict=True))
    entry = find_entry(scale, shift)
    if entry.row is None:
        assert not entry.move.any()
        return
    token = (z - z.mean(dtype=np.float64)) * scale + shift + entry.move
    assert token @ entry.row == pytest.approx(1.0, abs=1e-4)
    in_half = token.astype(np.float16).astype(np.float64)
    assert in_half @ entry.row == pytest.approx(1.0, abs=2e-2)


@pytest.mark.parametrize(("scale", "is_in_weights"), [(0.05, True), (0.005, False)])
def test_a_bias_goes_into_weights_only_where_less_than_a_thousandth_is_lost(scale: float, is_in_weights: bool) -> None:
    """Two shifts over their scales cancel: fp16 rounds each by 0.00024 of itself, and the sum of all is 15."""
    scales, shifts = np.ones(32, np.float32), np.full(32, 0.5, np.float32)
    scales[:2], shifts[1] = scale, -0.5
    lost = 2 * 0.5 / scale * 2**-12 / 2**0.5 / 15
    assert (lost < 1e-3) == is_in_weights
    assert (find_entry(scales, shifts).row is not None) == is_in_weights


@pytest.mark.parametrize("sum_per_value", [0.12, -0.12])
def test_tokens_are_moved_away_from_a_sum_of_0(sum_per_value: float) -> None:
    scale = np.linspace(0.5, 1.5, 32, dtype=np.float32)
    entry = find_entry(scale, sum_per_value * scale)
    assert entry.row is not None
    assert np.sign(entry.move).tolist() == [np.sign(sum_per_value)] * 32
