"""Products in 8 bits, against their arithmetic in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.linalg import hadamard

from cappy_engine.errors import GraphError
from cappy_export.precisions.float_graph import FloatGraph, joined_with
from cappy_export.precisions.int8 import quantize, quantize_products
from cappy_export.precisions.int8_graph import Int8Options
from cappy_export.precisions.rounding import compensate_weights


def product_model(
    path: Path, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], weights: dict[str, np.ndarray]
) -> Path:
    """x (batch, length, inputs) or (tokens, inputs) -> `outputs`, by `nodes` that read `weights`."""
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


def body_end(*names: str) -> list[onnx.NodeProto]:
    """What ends the body, so that the products before it are none of the head's."""
    return [
        helper.make_node("LayerNormalization", [name, f"{name}_ones"], [f"{name}_normed"], f"{name}_norm")
        for name in names
    ]


def run(path: Path, x: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
    """These outputs of the model, intermediate ones too."""
    model = onnx.load(str(path))
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name not in known
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(list(outputs), {"x": x})
    return found


def int8_product(x: np.ndarray, weights: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """An int8 product in numpy, calibrated on `seen`: rotated rows, a scale for each, sums in integers."""
    block = math.gcd(len(weights), 64)
    mean, spread = seen.mean(axis=0), np.cov(seen, rowvar=False, bias=True)
    np.fill_diagonal(spread, np.maximum(np.diag(spread), np.diag(spread).mean() / 16))
    ratio = np.sqrt(np.diag(spread)) / np.linalg.norm(weights, axis=1)
    factors = np.sqrt(ratio / np.exp(np.log(ratio).mean()))
    turn = np.kron(np.eye(len(weights) // block), hadamard(block) / block**0.5)
    moments = turn @ ((spread + np.outer(mean, mean)) / np.outer(factors, factors)) @ turn
    turned_weights = (turn @ (weights * factors[:, None])).astype(np.float32)
    steps, scales = compensate_weights(turned_weights, moments.astype(np.float32))
    turned = (x - mean) / factors @ turn
    scale = np.abs(turned).max(axis=-1, keepdims=True) / 127
    product: np.ndarray = (np.rint(turned / scale) @ steps.astype(np.float64)) * scales * scale + mean @ weights
    return product


RANDOM = np.random.default_rng(0)


X = (RANDOM.standard_normal((5, 16)) * np.geomspace(1e-3, 1e2, 5)[:, None]).astype(np.float32)


SEEN = (RANDOM.standard_normal((200, 16)) * np.geomspace(0.1, 3, 16) + 0.5).astype(np.float32)
"""What is calibrated on."""


CALIBRATION: list[Any] = [{"x": part} for part in np.split(SEEN, 4)]


W1 = RANDOM.standard_normal((16, 32)).astype(np.float32)


W2 = RANDOM.standard_normal((32, 16)).astype(np.float32)


B1 = RANDOM.standard_normal(32).astype(np.float32)


ONES = {"y_ones": np.ones(16, np.float32)}


def test_an_int8_product_is_its_arithmetic_in_numpy(tmp_path: Path) -> None:
    x = np.concatenate([X, np.zeros((1, 16), np.float32)])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/dense"), *body_end("y")]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": W1, "y_ones": np.ones(32, np.float32)})
    kept, counts = quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)
    assert (kept, counts) == ([], {"MatMul": 1})
    [found] = run(tmp_path / "q.onnx", x, ["y"])
    expected = int8_product(x, W1, SEEN)
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()
    error = np.linalg.norm(found - x @ W1, axis=-1)
    assert (error <= 0.03 * np.linalg.norm((x - SEEN.mean(axis=0)) @ W1, axis=-1)).all()


def test_a_product_after_gelu_is_its_arithmetic_in_numpy(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["wide"], "layer/up"),
        helper.make_node("Gelu", ["wide"], ["active"], "layer/gelu", domain="com.microsoft"),
        helper.make_node("MatMul", ["active", "w2"], ["y"], "layer/down"),
        *body_end("y"),
    ]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w1": W1, "b1": B1, "w2": W2, **ONES})
    quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert (kinds.count("LinearGelu"), kinds.count("Gelu"), kinds.count("Gemm")) == (1, 0, 0)
    [seen] = run(source, SEEN, ["active"])
    active, found = run(tmp_path / "q.onnx", X, ["active", "y"])
    expected = int8_product(active, W2, seen)
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize("columns", [32, 24], ids=["whole panels", "half a panel"])
def test_a_product_with_a_residual_and_a_layer_norm_is_its_arithmetic_in_numpy(tmp_path: Path, columns: int) -> None:
    """The residual may be made after the product. Weights that fill no whole panels stay ONNX Runtime's."""
    gamma, beta = RANDOM.standard_normal((2, columns)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["dense"], "layer/dense"),
        helper.make_node("MatMul", ["x", "v"], ["residual"], "head/residual"),
        helper.make_node("Add", ["residual", "dense"], ["mixed"], "layer/mixed"),
        helper.make_node("LayerNormalization", ["mixed", "gamma", "beta"], ["y"], "layer/norm", epsilon=0.25),
    ]
    stored = {"w": W1[:, :columns], "v": W1[::-1, :columns], "b": B1[:columns], "gamma": gamma, "beta": beta}
    source = product_model(tmp_path / "m.onnx", nodes, ["y"], {k: np.ascontiguousarray(v) for k, v in stored.items()})
    quantize_products(source, tmp_path / "q.onnx", Int8Options(["head"]), CALIBRATION)
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert kinds.count("LinearNorm") == (columns == 32)
    mixed = int8_product(X, stored["w"], SEEN) + stored["b"] + X @ stored["v"]
    centred = mixed - mixed.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 0.25) * gamma + beta
    [found] = run(tmp_path / "q.onnx", X, ["y"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_that_several_products_read_are_rounded_for_each(tmp_path: Path) -> None:
    """How they are rounded depends on what they are multiplied with."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "layer.0/dense"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "layer.1/dense"),
        *body_end("y"),
    ]
    weights = np.ascontiguousarray(W1[:, :16])
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": weights, **ONES})
    assert quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)[1] == {"MatMul": 2}
    stored = onnx.load(str(tmp_path / "q.onnx")).graph.initializer
    assert [list(entry.dims) for entry in stored if entry.data_type == TensorProto.INT8] == [[16, 16]] * 2
    assert not [entry for entry in stored if entry.name == "w"]
    [seen] = run(source, SEEN, ["a"])
    a, found = run(tmp_path / "q.onnx", X, ["a", "y"])
    for each, expected in ((a, int8_product(X, weights, SEEN)), (found, int8_product(a, weights, seen))):
        assert (np.abs(each - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()


def test_weights_read_as_they_are_and_transposed_are_not_confused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "layer.0/dense"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "layer.1/dense", transB=1),
        *body_end("y"),
    ]
    weights = np.ascontiguousarray(W1[:, :16])
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": weights, **ONES})
    quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)
    [exact], [found] = (run(path, SEEN, ["y"]) for path in (source, tmp_path / "q.onnx"))
    assert (np.linalg.norm(found - exact, axis=-1) <= 0.05 * np.linalg.norm(exact, axis=-1)).all()


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}], ids=str)
def test_a_gemm_that_is_more_than_a_product_and_a_bias_is_an_error(tmp_path: Path, attributes: dict[str, Any]) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer/dense", **attributes), *body_end("y")]
    stored = {"w": W1, "b": B1, "y_ones": np.ones(32, np.float32)}
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], stored)
    calibration: list[Any] = [{"x": SEEN[:16]}]  # a square: it can be transposed
    with pytest.raises(GraphError, match="layer/dense is a Gemm with"):
        quantize_products(source, tmp_path / "q.onnx", Int8Options(), calibration)


def test_a_mean_activation_comes_out_exact(tmp_path: Path) -> None:
    """Its product is in the bias, without the errors of rounded weights."""
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer/dense"), *body_end("y")]
    stored = {"w": W1, "b": B1, "y_ones": np.ones(32, np.float32)}
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], stored)
    quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)
    mean = SEEN.mean(axis=0)
    [found] = run(tmp_path / "q.onnx", np.stack([mean, -mean]), ["y"])
    np.testing.assert_allclose(found[0], mean @ W1 + B1, atol=1e-4)
    assert np.abs(found[1] - (B1 - mean @ W1)).max() > 1e-3


def test_that_every_product_stays_in_float32_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/dense"), *body_end("y")]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": W1, "y_ones": np.ones(32, np.float32)})
    with pytest.raises(GraphError, match="0 matrix products were not quantised: there are none"):
        quantize(source, tmp_path / "q.onnx", CALIBRATION, float32_products=["layer"])


def test_a_product_that_stays_in_float32_may_be_of_a_kind_that_is_not_known(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer.0/dense", alpha=0.5),
        helper.make_node("MatMul", ["x", "w"], ["z"], "layer.1/dense"),
        *body_end("y", "z"),
    ]
    stored = {"w": W1, "b": B1, "y_ones": np.ones(32, np.float32), "z_ones": np.ones(32, np.float32)}
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed", "z_normed"], stored)
    options = Int8Options(["layer.0"])
    assert quantize_products(source, tmp_path / "q.onnx", options, CALIBRATION)[1] == {"MatMul": 1}


def test_products_may_follow_each_other(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["layer.0/dense"], "layer.0/dense"),
        helper.make_node("MatMul", ["layer.0/dense", "w"], ["y"], "layer.1/dense"),
        *body_end("y"),
    ]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"v": W1, "w": W2, **ONES})
    quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)
    [found] = run(tmp_path / "q.onnx", SEEN, ["y"])
    error = np.linalg.norm(found - SEEN @ W1 @ W2, axis=-1)
    assert (error <= 0.03 * np.linalg.norm(SEEN @ W1 @ W2, axis=-1)).all()


def test_weights_that_only_a_branch_reads_are_kept(tmp_path: Path) -> None:
    moved = helper.make_tensor_value_info("moved", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Add", ["x", "shift"], ["moved"], "add")], "branch", [], [moved])
    nodes = [
        helper.make_node("If", ["yes"], ["chosen"], "if", then_branch=branch, else_branch=branch),
        helper.make_node("MatMul", ["chosen", "w"], ["y"], "layer/dense"),
        *body_end("y"),
    ]
    stored = {"w": W1, "shift": SEEN[0], "yes": np.array(True), "y_ones": np.ones(32, np.float32)}
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], stored)
    quantize_products(source, tmp_path / "q.onnx", Int8Options(), CALIBRATION)
    [found] = run(tmp_path / "q.onnx", X, ["y"])
    expected = int8_product(X + SEEN[0], W1, SEEN + SEEN[0])
    assert (np.abs(found - expected) <= 1e-4 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize(("domain", "operator"), [("com.microsoft", "LinearGelu"), ("", "Linear")])
def test_a_gelu_that_may_be_approximate_is_not_joined(tmp_path: Path, domain: str, operator: str) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["wide"], "layer/up"),
        helper.make_node("Gelu", ["wide"], ["y"], "layer/gelu", domain=domain),
    ]
    model = onnx.load(product_model(tmp_path / "m.onnx", nodes, ["y"], {"w": W1, "b": B1}))
    assert joined_with(FloatGraph(model), model.graph.node[0]).operator == operator


def test_a_graph_that_the_engine_could_not_run_is_an_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/dense"), *body_end("y")]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": W1, "y_ones": np.ones(32, np.float32)})
    with pytest.raises(GraphError, match=r"onnx\.checker refuses q\.onnx"):
        quantize(source, tmp_path / "q.onnx", CALIBRATION)
