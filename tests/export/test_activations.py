"""What a graph's products read, measured, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from cappy_export.precisions.calibration import measure_activations


def test_activations_are_measured_over_all_tokens_of_all_batches(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["size"], "size"), helper.make_node("Neg", ["size"], ["y"], "y")],
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    random = np.random.default_rng(0)
    batches: list[Any] = [{"x": random.standard_normal((2, length, 4)).astype(np.float32)} for length in (3, 9)]
    found = measure_activations(tmp_path / "m.onnx", ["size", "y"], batches, has_moments=True)
    rows = np.abs(np.concatenate([batch["x"].reshape(-1, 4) for batch in batches]))
    for name, wanted in (("size", rows), ("y", -rows)):
        moments = found[name].moments
        assert moments is not None
        np.testing.assert_allclose(found[name].mean, wanted.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(moments, wanted.T @ wanted / len(wanted), rtol=1e-5)
    assert measure_activations(tmp_path / "m.onnx", ["y"], batches)["y"].moments is None
    assert measure_activations(tmp_path / "m.onnx", ["y"], []) == {}
