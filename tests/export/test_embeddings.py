"""Embeddings in fewer bits: they come back, and only large tables are changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine.bundle import MODEL_FILES
from cappy_export.precisions.embeddings import MIN_TABLE_ROWS, Bits, quantize_embeddings


def lookup_model(path: Path, table: np.ndarray) -> Path:
    """ids (batch, length) -> rows of `table`, looked up twice, and of a table of two rows."""
    small = np.eye(2, table.shape[1], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["words", "ids"], ["first"], "first"),
            helper.make_node("Gather", ["words", "ids"], ["second"], "second"),
            helper.make_node("Sub", ["ids", "ids"], ["zeros"], "zeros"),
            helper.make_node("Gather", ["types", "zeros"], ["third"], "third"),
        ],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("first", "second", "third")],
        [numpy_helper.from_array(table, "words"), numpy_helper.from_array(small, "types")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(("bits", "part"), [(8, 253), (12, 4090), (16, 2047)])
def test_rows_come_back_to_half_a_step_of_their_own_scale(tmp_path: Path, bits: Bits, part: int) -> None:
    random = np.random.default_rng(0)
    table = random.standard_normal((MIN_TABLE_ROWS, 16)).astype(np.float32) * np.geomspace(1e-3, 1e3, MIN_TABLE_ROWS)[
        :, None
    ].astype(np.float32)
    table[1] = 0.0  # the padding's
    path = lookup_model(tmp_path / "lookup.onnx", table)
    assert quantize_embeddings(path, bits) == 1
    ids = random.integers(0, MIN_TABLE_ROWS, (3, 50))
    ids[0, 0] = 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    first, second, third = session.run(None, {"ids": ids})
    wanted = table[ids]
    assert (np.abs(first - wanted) <= np.abs(wanted).max(axis=-1, keepdims=True) / part).all()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, np.broadcast_to(np.eye(1, 16, dtype=np.float32), third.shape))


def test_rows_of_an_odd_number_of_values_have_16_bits_for_12(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((MIN_TABLE_ROWS, 7)).astype(np.float32)
    path = lookup_model(tmp_path / "lookup.onnx", table)
    assert quantize_embeddings(path, 12) == 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["first"], {"ids": [[5, 6]]})[0], [table[5:7]], rtol=1e-3)


@pytest.mark.parametrize(
    "table",
    [np.ones((MIN_TABLE_ROWS - 1, 4), np.float32), np.ones((MIN_TABLE_ROWS, 4), np.int64)],
    ids=["small", "whole numbers"],
)
def test_tables_that_are_small_or_no_floats_stay_as_they_are(tmp_path: Path, table: np.ndarray) -> None:
    path = lookup_model(tmp_path / "lookup.onnx", table)
    before = path.read_bytes()
    assert quantize_embeddings(path) == 0
    assert onnx.load(str(path)) == onnx.load_model_from_string(before)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", [TensorProto.FLOAT]),
        ("fp16", [TensorProto.FLOAT16]),
        ("bf16", [TensorProto.FLOAT16]),
        ("int8", [TensorProto.INT8, TensorProto.UINT8]),
    ],
)
def test_only_int8_has_its_words_in_12_bits(bundle: Path, precision: str, expected: list[int]) -> None:
    model = onnx.load(str(bundle / MODEL_FILES[precision]))
    tables = [entry for entry in model.graph.initializer if len(entry.dims) == 2 and entry.dims[0] >= MIN_TABLE_ROWS]
    assert [entry.data_type for entry in tables if entry.dims[1] > 1] == expected
