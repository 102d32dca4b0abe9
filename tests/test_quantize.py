"""int8: what is stored in 8 bits, and that looking up an embedding gives the row back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine.bundle import MODEL_FILES
from cappy_engine.errors import ExportError
from cappy_export import export
from cappy_export.quantize import MIN_TABLE_ROWS, products_with_weights, quantize_embeddings


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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def test_rows_come_back_to_half_a_step_of_their_own_scale(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = random.standard_normal((MIN_TABLE_ROWS, 16)).astype(np.float32) * np.geomspace(1e-3, 1e3, MIN_TABLE_ROWS)[
        :, None
    ].astype(np.float32)
    table[1] = 0.0  # the padding's
    path = lookup_model(tmp_path / "lookup.onnx", table)
    assert quantize_embeddings(path) == 1
    ids = random.integers(0, MIN_TABLE_ROWS, (3, 50))
    ids[0, 0] = 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    first, second, third = session.run(None, {"ids": ids})
    wanted = table[ids]
    assert (np.abs(first - wanted) <= np.abs(wanted).max(axis=-1, keepdims=True) / 253).all()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, np.broadcast_to(np.eye(1, 16, dtype=np.float32), third.shape))


def test_small_tables_stay_as_they_are(tmp_path: Path) -> None:
    path = lookup_model(tmp_path / "lookup.onnx", np.ones((MIN_TABLE_ROWS - 1, 4), dtype=np.float32))
    before = path.read_bytes()
    assert quantize_embeddings(path) == 0
    assert onnx.load(str(path)) == onnx.load_model_from_string(before)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_only_int8_has_its_words_in_8_bits(bundle: Path, precision: str) -> None:
    model = onnx.load(str(bundle / MODEL_FILES[precision]))
    tables = [entry for entry in model.graph.initializer if len(entry.dims) == 2 and entry.dims[0] >= MIN_TABLE_ROWS]
    types = {entry.data_type for entry in tables if entry.dims[1] > 1}
    assert types == {TensorProto.INT8 if precision == "int8" else TensorProto.FLOAT}


def test_a_named_product_stays_in_float32_and_the_others_do_not(checkpoint: Path, tmp_path: Path) -> None:
    manifest = export(
        checkpoint, tmp_path / "bundle", precisions=["fp32", "int8"], float32_products=["layer.1/output/dense"]
    )
    [kept] = manifest["graphs"]["int8"]["products_in_fp32"]
    assert "layer.1/output/dense" in kept
    assert products_with_weights(tmp_path / "bundle" / MODEL_FILES["int8"]) == [kept]
    assert len(products_with_weights(tmp_path / "bundle" / MODEL_FILES["fp32"])) == 4 * 2


@pytest.mark.parametrize(
    ("precisions", "message"),
    [(["int8"], "no matrix product is named 'layer.7'; there are .*layer.1/output"), (["fp32"], "name it as a pre")],
)
def test_a_product_that_is_not_there_is_an_error(
    checkpoint: Path, tmp_path: Path, precisions: list[str], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(checkpoint, tmp_path / "bundle", precisions=precisions, float32_products=["layer.7"])
    assert not (tmp_path / "bundle").exists()
