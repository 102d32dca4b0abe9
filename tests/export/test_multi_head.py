"""Attention whose projections were taken out of it is the same attention, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine.errors import GraphError
from cappy_export.graphs.writer import MICROSOFT
from cappy_export.precisions.float_graph import multi_head

HIDDEN = 8
RANDOM = np.random.default_rng(7)
X = RANDOM.standard_normal((2, 5, HIDDEN)).astype(np.float32)
STORED: dict[str, np.ndarray] = {
    "weights": RANDOM.standard_normal((HIDDEN, 3 * HIDDEN)).astype(np.float32),
    "bias": RANDOM.standard_normal(3 * HIDDEN).astype(np.float32),
    "mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32),
    "nearness": RANDOM.standard_normal((2, 2, 5, 5)).astype(np.float32),
}
ROLES = ("query", "key", "value")


def attention(inputs: str = "x weights bias mask", outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """Attention of 2 heads; a "-" among the names of its inputs is one that it does not have."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node("Attention", names, outputs.split(), "layer", domain=MICROSOFT, num_heads=2, **attributes)


def run(folder: Path, nodes: list[onnx.NodeProto]) -> np.ndarray:
    """Compute y of X."""
    parts = zip(ROLES, np.split(STORED["weights"], 3, axis=1), strict=True)
    stored = {**STORED, **{f"{role}_weights": np.ascontiguousarray(part) for role, part in parts}}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(X.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "m.onnx")
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["y"], {"x": X})[0]
    return found


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        ("x weights bias mask", {}),
        ("x weights bias mask", {"scale": 0.1}),
        ("x weights bias mask", {"mask_filter_value": -1.0}),
        ("x weights bias mask - nearness", {}),
        ("x weights bias", {}),
    ],
    ids=str,
)
def test_attention_of_its_three_projections_is_what_it_was(
    tmp_path: Path, inputs: str, attributes: dict[str, Any]
) -> None:
    node, plain = attention(inputs, **attributes), attention()
    products = [helper.make_node("MatMul", ["x", f"{role}_weights"], [role], role) for role in ROLES]
    wanted = run(tmp_path, [node])
    np.testing.assert_allclose(run(tmp_path, [*products, multi_head(node, ROLES)]), wanted, atol=1e-5)
    assert node == plain or np.abs(run(tmp_path, [plain]) - wanted).max() > 0.01


@pytest.mark.parametrize(
    "node",
    [
        attention(unidirectional=1),
        attention(qkv_hidden_sizes=[8, 8, 8]),
        attention("x weights bias mask past"),
        attention(outputs="y present"),
    ],
    ids=["looks back only", "other sizes", "reads a past", "gives a past"],
)
def test_attention_that_does_more_is_an_error(node: onnx.NodeProto) -> None:
    with pytest.raises(GraphError, match="layer is an Attention of a kind that is not known"):
        multi_head(node, ROLES)
