"""Products in 8 bits, against their arithmetic in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine.errors import GraphError
from cappy_export.precisions.int8 import quantize, quantize_products
from cappy_export.precisions.int8_graph import Int8Options
from cappy_export.precisions.rounding import quantize_weights


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


def int8_product(x: np.ndarray, weights: np.ndarray, *, zero_point: int, steps: int, least: float) -> np.ndarray:
    """The arithmetic of an int8 product in numpy: a scale per token, sums in integers."""
    rows, scales = quantize_weights(weights)
    largest = (x if zero_point < 100 else np.abs(x)).max(axis=-1, keepdims=True)
    scale = np.maximum(largest, np.float32(least)) * np.float32(1 / steps)
    whole = np.clip(np.rint(x * (np.float32(1) / scale)) + zero_point, 0, 255).astype(np.int64) - zero_point
    product: np.ndarray = (whole @ rows.astype(np.int64)).astype(np.float64) * scales * scale
    return product


RANDOM = np.random.default_rng(0)


X = (RANDOM.standard_normal((5, 16)) * np.geomspace(1e-3, 1e2, 5)[:, None]).astype(np.float32)


W1 = RANDOM.standard_normal((16, 32)).astype(np.float32)


W2 = RANDOM.standard_normal((32, 16)).astype(np.float32)


B1 = RANDOM.standard_normal(32).astype(np.float32)


ONES = {"y_ones": np.ones(16, np.float32)}


def test_an_int8_product_is_its_arithmetic_in_numpy(tmp_path: Path) -> None:
    x = np.concatenate([X, np.zeros((1, 16), np.float32)])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "layer/dense"), *body_end("y")]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": W1, "y_ones": np.ones(32, np.float32)})
    kept, counts = quantize_products(source, tmp_path / "q.onnx", Int8Options())
    assert (kept, counts) == ([], {"MatMul": 1})
    [found] = run(tmp_path / "q.onnx", x, ["y"])
    expected = int8_product(x, W1, zero_point=128, steps=127, least=1e-12)
    assert (np.abs(found - expected) <= 1e-5 * np.maximum(1, np.abs(expected))).all()
    error = np.linalg.norm(found - x @ W1, axis=-1)
    assert (error <= 0.03 * np.linalg.norm(x @ W1, axis=-1)).all()


def test_a_product_after_gelu_uses_239_steps_above_16(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["wide"], "layer/up"),
        helper.make_node("Gelu", ["wide"], ["active"], "layer/gelu", domain="com.microsoft"),
        helper.make_node("MatMul", ["active", "w2"], ["y"], "layer/down"),
        *body_end("y"),
    ]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w1": W1, "b1": B1, "w2": W2, **ONES})
    quantize_products(source, tmp_path / "q.onnx")
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert (kinds.count("LinearGelu"), kinds.count("Gelu"), kinds.count("Gemm")) == (1, 0, 0)
    active, found = run(tmp_path / "q.onnx", X, ["active", "y"])
    expected = int8_product(active, W2, zero_point=16, steps=239, least=0.17 * 239 / 16)
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
    quantize_products(source, tmp_path / "q.onnx", Int8Options(float32_products=["head"]))
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert kinds.count("LinearNorm") == (columns == 32)
    product = int8_product(X, stored["w"], zero_point=128, steps=127, least=1e-12)
    mixed = product + stored["b"] + X @ stored["v"]
    centred = mixed - mixed.mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 0.25) * gamma + beta
    [found] = run(tmp_path / "q.onnx", X, ["y"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_that_several_products_read_are_stored_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "layer.0/dense"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "layer.1/dense"),
        *body_end("y"),
    ]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": W1[:, :16], **ONES})
    assert quantize_products(source, tmp_path / "q.onnx")[1] == {"MatMul": 2}
    stored = onnx.load(str(tmp_path / "q.onnx")).graph.initializer
    assert [list(entry.dims) for entry in stored if entry.data_type == TensorProto.INT8] == [[16, 16]]
    assert not [entry for entry in stored if entry.name == "w"]


def test_weights_read_as_they_are_and_transposed_are_not_confused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "layer.0/dense"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "layer.1/dense", transB=1),
        *body_end("y"),
    ]
    weights = np.ascontiguousarray(W1[:, :16])
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": weights, **ONES})
    quantize_products(source, tmp_path / "q.onnx")
    [exact], [found] = (run(path, X, ["y"]) for path in (source, tmp_path / "q.onnx"))
    assert (np.linalg.norm(found - exact, axis=-1) <= 0.05 * np.linalg.norm(exact, axis=-1)).all()


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}], ids=str)
def test_a_gemm_that_is_more_than_a_product_and_a_bias_is_an_error(tmp_path: Path, attributes: dict[str, Any]) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer/dense", **attributes), *body_end("y")]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"w": W2, "b": B1[:16], **ONES})
    with pytest.raises(GraphError, match="layer/dense is a Gemm with"):
        quantize_products(source, tmp_path / "q.onnx")


def test_a_mean_activation_comes_out_exact_but_for_its_own_rounding(tmp_path: Path) -> None:
    """Bias correction: the rounding of the weights is taken out of the product of the mean."""
    mean = np.full(16, 1, np.float32)  # 127 steps, so exact in 8 bits
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer/dense"), *body_end("y")]
    stored = {"w": W1, "b": B1, "y_ones": np.ones(32, np.float32)}
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], stored)
    calibration: list[Any] = [{"x": mean[None, :]}]
    quantize_products(source, tmp_path / "q.onnx", Int8Options(), calibration)
    [found] = run(tmp_path / "q.onnx", mean[None, :], ["y"])
    np.testing.assert_allclose(found[0], mean @ W1 + B1, atol=1e-4)
    quantize_products(source, tmp_path / "plain.onnx")
    [plain] = run(tmp_path / "plain.onnx", mean[None, :], ["y"])
    assert np.abs(plain[0] - (mean @ W1 + B1)).max() > 1e-3


def correlated_tokens(seed: int, tokens: int) -> np.ndarray:
    """(tokens, 64): a few directions carry most of the variance, the mean is not 0, one channel is far above others."""
    mixing = np.random.default_rng(0).standard_normal((4, 64))
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, 4)) @ mixing + 0.2 * random.standard_normal((tokens, 64)) + 0.5
    x[:, 5] *= 20
    made: np.ndarray = x.astype(np.float32)
    return made


ROTATED = Int8Options(rotates=True)


ACCURATE = Int8Options(rotates=True, compensates=True)


def two_products(path: Path) -> Path:
    """x (batch, length, 64) -> y, by a product with a bias, and z, by one without."""
    random = np.random.default_rng(1)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "v", "b"], ["y"], "layer.0/dense"),
        helper.make_node("MatMul", ["flat", "w"], ["z"], "layer.1/dense"),
        *body_end("y", "z"),
    ]
    weights = {name: random.standard_normal((64, 32)).astype(np.float32) / 8 for name in ("v", "w")}
    ones = {f"{name}_ones": np.ones(32, np.float32) for name in ("y", "z")}
    stored: dict[str, np.ndarray] = {**weights, **ones, "b": np.ones(32, np.float32), "shape": np.array([-1, 64])}
    return product_model(path, nodes, ["y_normed", "z_normed"], stored)


def errors(source: Path, options: Int8Options, seen: np.ndarray, fresh: np.ndarray) -> tuple[float, float]:
    """How far y and z are from float32's on `fresh`, calibrated on `seen`; both (1, tokens, 64)."""
    out = source.with_name("q.onnx")
    calibration: list[Any] = [{"x": part} for part in np.split(seen, 4, axis=1)]
    assert quantize_products(source, out, options, calibration)[1] == {"Gemm": 1, "MatMul": 1}
    y, z = (a - b for a, b in zip(run(out, fresh, ["y", "z"]), run(source, fresh, ["y", "z"]), strict=True))
    return float(np.sqrt(np.mean(y**2))), float(np.sqrt(np.mean(z**2)))


def test_rotation_and_compensation_each_make_products_closer(tmp_path: Path) -> None:
    source = two_products(tmp_path / "m.onnx")
    seen, fresh = correlated_tokens(2, 400)[None], correlated_tokens(3, 200)[None]
    plain, rotated, accurate = (errors(source, each, seen, fresh) for each in (Int8Options(), ROTATED, ACCURATE))
    assert all(later < 0.75 * before for before, later in zip(plain, rotated, strict=True))
    assert all(later < 0.75 * before for before, later in zip(rotated, accurate, strict=True))


def test_products_that_read_the_same_share_its_rotation(tmp_path: Path) -> None:
    source = two_products(tmp_path / "m.onnx")
    errors(source, ACCURATE, correlated_tokens(2, 400)[None], correlated_tokens(3, 8)[None])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "q.onnx")).graph.node]
    assert (kinds.count("QuantizeRotatedRows"), kinds.count("MatMul"), kinds.count("Gemm")) == (1, 0, 0)


@pytest.mark.parametrize("loudness", [0.0, 1e-3, 1e-2])
def test_a_channel_that_calibration_hardly_saw_may_be_alive_later(tmp_path: Path, loudness: float) -> None:
    source = two_products(tmp_path / "m.onnx")
    seen, fresh = correlated_tokens(2, 400)[None], correlated_tokens(3, 200)[None]
    seen[..., 7:11] *= loudness
    plain, accurate = (errors(source, each, seen, fresh) for each in (Int8Options(), ACCURATE))
    assert all(later < before for before, later in zip(plain, accurate, strict=True))


def test_rotated_products_are_right_in_the_mean(tmp_path: Path) -> None:
    """The mean is taken out of what is rounded, and its product is added: to the bias, where there is one."""
    source = two_products(tmp_path / "m.onnx")
    seen = correlated_tokens(2, 4000)[None]
    shifts = []
    for options in (ROTATED, Int8Options()):
        errors(source, options, seen, seen)
        found, exact = (run(path, seen, ["y", "z"]) for path in (tmp_path / "q.onnx", source))
        shifts.append([np.linalg.norm((a - b).mean(axis=0)) for a, b in zip(found, exact, strict=True)])
    rotated, (_, uncorrected) = shifts
    assert max(rotated) < uncorrected / 5


def test_that_every_product_stays_in_float32_is_an_error(tmp_path: Path) -> None:
    source = two_products(tmp_path / "m.onnx")
    calibration: list[Any] = [{"x": correlated_tokens(2, 40)[None]}]
    with pytest.raises(GraphError, match="0 matrix products were not quantised: there are none"):
        quantize(source, tmp_path / "q.onnx", calibration, float32_products=["layer"])


def test_a_product_that_stays_in_float32_may_be_of_a_kind_that_is_not_known(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer.0/dense", alpha=0.5),
        helper.make_node("MatMul", ["x", "w"], ["z"], "layer.1/dense"),
        *body_end("y", "z"),
    ]
    stored = {"w": W1, "b": B1, "y_ones": np.ones(32, np.float32), "z_ones": np.ones(32, np.float32)}
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed", "z_normed"], stored)
    options = Int8Options(rotates=True, compensates=True, float32_products=["layer.0"])
    calibration: list[Any] = [{"x": X}]
    assert quantize_products(source, tmp_path / "q.onnx", options, calibration)[1] == {"MatMul": 1}


def test_compensated_products_may_follow_each_other(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["layer.0/dense"], "layer.0/dense"),
        helper.make_node("MatMul", ["layer.0/dense", "w"], ["y"], "layer.1/dense"),
        *body_end("y"),
    ]
    source = product_model(tmp_path / "m.onnx", nodes, ["y_normed"], {"v": W1, "w": W2, **ONES})
    calibration: list[Any] = [{"x": X}]
    quantize_products(source, tmp_path / "q.onnx", Int8Options(compensates=True), calibration)
    [found] = run(tmp_path / "q.onnx", X, ["y"])
    error = np.linalg.norm(found - X @ W1 @ W2, axis=-1)
    assert (error <= 0.03 * np.linalg.norm(X @ W1 @ W2, axis=-1)).all()


def test_calibration_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    calibration: list[Any] = [{"x": np.full((1, 4, 64), np.inf, np.float32)}]
    with pytest.raises(GraphError, match="flat is not finite on the pairs to calibrate on"):
        quantize_products(two_products(tmp_path / "m.onnx"), tmp_path / "q.onnx", ACCURATE, calibration)
