"""What a graph computes on calibration pairs, measured, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine.tokenizer import PairTokenizer
from cappy_export.precisions import calibration
from cappy_export.precisions.calibration import CalibrationPairs, activation_ranges, measure_activations, take_census
from cappy_export.precisions.fp16 import overflowing_nodes


@pytest.mark.parametrize("tokens_at_once", [1, 7, 1000])
def test_activations_are_measured_over_all_tokens_of_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["size"], "size"), helper.make_node("Neg", ["size"], ["y"], "y")],
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    random = np.random.default_rng(0)
    batches: list[Any] = [{"x": random.standard_normal((2, length, 4)).astype(np.float32)} for length in (3, 9)]
    monkeypatch.setattr(calibration, "TOKENS_AT_ONCE", tokens_at_once)
    found = measure_activations(tmp_path / "m.onnx", ["size", "y"], batches)
    rows = np.abs(np.concatenate([batch["x"].reshape(-1, 4) for batch in batches]))
    for name, wanted in (("size", rows), ("y", -rows)):
        spread, moments = found[name].spread, found[name].moments
        np.testing.assert_allclose(found[name].mean, wanted.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(spread, np.cov(wanted, rowvar=False, bias=True), atol=1e-5)
        np.testing.assert_allclose(moments, wanted.T @ wanted / len(wanted), atol=1e-5)
    assert measure_activations(tmp_path / "m.onnx", ["y"], []) == {}


def test_the_census_sees_the_largest_value_of_every_tensor(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Neg", ["square"], ["logits"])]
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "logits"))
    weights = {"w": np.array([2, -7], np.float32), "empty": np.zeros((2, 0), np.float32), "ids": np.array([9])}
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [out], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    feeds = [{"x": np.array(values, dtype=np.float32)} for values in ([1, -3], [2, 0], [])]
    largest = take_census(tmp_path / "m.onnx", feeds).largest  # type: ignore[arg-type]
    assert largest == {"w": 7.0, "square": 9.0, "logits": 9.0}


def test_ranges_are_those_of_every_channel_that_a_product_with_weights_reads(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "y"), helper.make_node("MatMul", ["y", "y"], ["z"], "z")],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "m.onnx")
    batches: list[Any] = [
        {"x": np.array([[[1, -5], [2, 3]]], np.float32)},
        {"x": np.array([[[-4, 0], [0, 0]]], np.float32)},
    ]
    found = activation_ranges(tmp_path / "m.onnx", batches)
    assert {name: values.tolist() for name, values in found.items()} == {"x": [4.0, 5.0]}


def test_pairs_to_calibrate_on_come_one_by_one_from_all_lengths(bundle: Path) -> None:
    tokenizer = PairTokenizer.from_file(bundle / "tokenizer.json", max_length=64)
    encoded = tokenizer.encode([("word " * count, "yes") for count in range(40)])
    inputs = list(CalibrationPairs(encoded, pad_token_id=1).inputs(10))
    lengths = [found["input_ids"].shape[1] for found in inputs]
    assert len(inputs) == 10
    assert lengths == sorted(encoded.lengths.tolist(), reverse=True)[::4]
    assert all(found["attention_mask"].all() for found in inputs)
    assert inputs[-1]["position_ids"].tolist() == [list(range(2, 2 + lengths[-1]))]


@pytest.mark.parametrize("values", [[-1, 4], [4, -1]], ids=str)
def test_a_value_that_is_not_a_number_is_remembered_whatever_comes_later(tmp_path: Path, values: list[float]) -> None:
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"], "root"),
        helper.make_node("IsNaN", ["root"], ["strange"], "strange"),
        helper.make_node("Where", ["strange", "x", "root"], ["logits"], "chosen"),
    ]
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "logits"))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [out]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.save(model, tmp_path / "m.onnx")
    census = take_census(tmp_path / "m.onnx", [{"x": np.array([value], np.float32)} for value in values])
    assert np.isnan(census.largest["root"])
    assert "root" in overflowing_nodes(model, census.largest)
