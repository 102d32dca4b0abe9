"""fp16 of a GPU, on the CPU: what is fp16 in the graph is rounded, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_export.gpu_models import runnable_on_cpu
from cappy_export.precisions.calibration import exposed_values, open_exposed

RANDOM = np.random.default_rng(5)
ROWS = RANDOM.integers(-63, 64, (7, 96)).astype(np.float32) / 8
WEIGHTS = RANDOM.integers(-63, 64, (96, 32)).astype(np.float16) / np.float16(8)
SHIFT = RANDOM.integers(-63, 64, 32).astype(np.float16) / np.float16(64)
"""Their sums are exact in float32, in any order, and need more bits than fp16 has."""


def save_graph(path: Path, nodes: list[onnx.NodeProto], weights: Mapping[str, Any], columns: int) -> Path:
    """Write a graph that takes `rows` of 96 values, and gives `out`."""
    graph = helper.make_graph(
        [helper.make_node("Cast", ["rows"], ["half"], to=TensorProto.FLOAT16), *nodes],
        "half",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["tokens", 96])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["tokens", columns])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write a product and a sum in fp16, between casts, and a sum in float32 behind them."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["half", "weights"], ["product"]),
        node("Add", ["product", "shift"], ["sum"]),
        node("Cast", ["sum"], ["wide"], to=TensorProto.FLOAT),
        node("Add", ["wide", "third"], ["out"]),
    ]
    weights = {"weights": WEIGHTS, "shift": SHIFT, "third": np.array(1 / 3, np.float32)}
    return save_graph(tmp_path / "model.onnx", nodes, weights, 32)


def test_8_bit_products_are_exact_on_any_cpu(gpu_bundle: Path, tmp_path: Path) -> None:
    """Without VNNI, ONNX Runtime's own 8-bit products saturate."""
    model = gpu_bundle / "tensorrt" / "model_int8.onnx"
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(model).graph.node}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    twin = runnable_on_cpu(model, "tensorrt", tmp_path)
    onnxruntime.InferenceSession(twin, options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert not {kind for kind in kinds if "Integer" in kind or kind.startswith("QLinear")}


def test_each_fp16_value_is_rounded(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    before = sorted(tmp_path.iterdir())
    twin = onnxruntime.InferenceSession(runnable_on_cpu(model, "tensorrt", work), providers=["CPUExecutionProvider"])
    product = (ROWS @ WEIGHTS.astype(np.float32)).astype(np.float16)
    wide = (product + SHIFT).astype(np.float32)
    np.testing.assert_array_equal(twin.run(None, {"rows": ROWS})[0], wide + np.float32(1 / 3))
    exact = ROWS @ WEIGHTS.astype(np.float32) + SHIFT
    assert np.mean(exact != wide) > 0.1  # rounding matters here
    assert sorted(tmp_path.iterdir()) == before  # a bundle is only read


def run_twin(model: Path, folder: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    twin = onnxruntime.InferenceSession(runnable_on_cpu(model, "tensorrt", folder), providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, np.dtype[np.float32]] = twin.run(None, {"rows": ROWS})[0]
    return found


def test_casts_to_whole_numbers_stay(tmp_path: Path) -> None:
    """As those of places, by which embeddings are looked up."""
    nodes = [
        helper.make_node("Add", ["half", "third"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Cast", ["whole"], ["out"], to=TensorProto.FLOAT),
    ]
    third = np.array(1 / 3, np.float16)
    found = run_twin(save_graph(tmp_path / "model.onnx", nodes, {"third": third}, 96), tmp_path)
    np.testing.assert_array_equal(found, np.trunc(ROWS.astype(np.float16) + third))


def test_values_out_of_8_bits_are_not_rounded_to_fp16(tmp_path: Path) -> None:
    """The device multiplies the 8-bit numbers."""
    scale, zero = np.array(0.1, np.float16), np.array(0, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["steps"]),
        helper.make_node("DequantizeLinear", ["steps", "scale", "zero"], ["back"]),
        helper.make_node("Cast", ["back"], ["out"], to=TensorProto.FLOAT),
    ]
    found = run_twin(save_graph(tmp_path / "model.onnx", nodes, {"scale": scale, "zero": zero}, 96), tmp_path)
    np.testing.assert_array_equal(found, np.rint(ROWS / np.float32(scale)) * np.float32(scale))
    assert (found != found.astype(np.float16)).any()


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("cuda", {"PackedMultiHeadAttention", "SkipLayerNormalization", "BiasGelu"}),
        ("tensorrt", {"MatMul", "LayerNormalization", "Softmax", "Erf"}),
    ],
)
def test_a_bundles_fp16_is_proven_with_fp16_values(
    gpu_bundle: Path, tmp_path: Path, target: str, kinds: set[str]
) -> None:
    model = gpu_bundle / target / "model_fp16.onnx"
    graph = onnx.load(model).graph
    body = [node for node in graph.node if "classifier" not in node.name and node.op_type in kinds]
    assert {node.op_type for node in body} == kinds
    names = [node.output[0] for node in body]
    inputs = {entry.name: np.ones((1, 5), np.int64) for entry in graph.input}
    values = next(exposed_values(open_exposed(runnable_on_cpu(model, target, tmp_path), names), names, [inputs]))
    for name, value in values.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, value.astype(np.float16), name)
