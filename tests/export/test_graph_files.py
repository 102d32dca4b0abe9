"""Files of graphs: what is checked, and weights beside a large one, which other tools read, too."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

from cappy_engine import Scorer
from cappy_engine.bundle import MODEL_FILES
from cappy_engine.bundle_files import EXTERNAL_SUFFIX
from cappy_engine.errors import BundleError, GraphError
from cappy_engine.options import Precision
from cappy_export import ExportOptions, export
from cappy_export.graphs.files import check_graph, head_nodes, quiet, save


@pytest.fixture(scope="module")
def large_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was exported as a large model is: with its weights beside the graphs."""
    path = tmp_path_factory.mktemp("large") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cappy_export.graphs.files.EXTERNAL_BYTES", 0)
        patch.setattr("cappy_export.graphs.files.EXTERNAL_TENSOR_BYTES", 256)
        export(checkpoint, path, ExportOptions(precisions=("fp32", "fp16", "int8"), keep=("fp32", "int8")))
    return path


@pytest.mark.slow
def test_weights_beside_a_graph_are_written_once_and_readable_by_who_reads_the_graph(large_bundle: Path) -> None:
    assert {path.name for path in (large_bundle / "onnx").iterdir()} == {
        "model.onnx", "model.onnx_data", "model_quantized.onnx", "model_quantized.onnx_data"
    }  # fmt: skip
    for name in ("model.onnx", "model_quantized.onnx"):
        graph, data = large_bundle / "onnx" / name, large_bundle / "onnx" / f"{name}_data"
        loaded = onnx.load(graph).graph.initializer
        beside = sum(len(entry.raw_data) for entry in loaded if len(entry.raw_data) >= 256)
        assert beside <= data.stat().st_size < 1.1 * beside + 4096 * len(loaded)  # each begins at a page
        assert data.stat().st_mode == graph.stat().st_mode


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_beside_a_graph_give_the_same_scores(bundle: Path, large_bundle: Path, precision: Precision) -> None:
    pairs = [("Is the sky blue?", "Yes"), ("Name a fruit.", "A pear")]
    with Scorer.open(bundle, precision=precision) as one, Scorer.open(large_bundle, precision=precision) as other:
        np.testing.assert_array_equal(one.score(pairs), other.score(pairs))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_changed_byte_of_weights_beside_a_graph_is_refused(
    large_bundle: Path, tmp_path: Path, precision: Precision
) -> None:
    copy = shutil.copytree(large_bundle, tmp_path / "copy")
    path = copy / (MODEL_FILES[precision] + EXTERNAL_SUFFIX)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{path.name} in bundle .* is not the file that was exported"):
        Scorer.open(copy, precision=precision)


def test_optimum_reads_weights_beside_a_graph(large_bundle: Path) -> None:
    model = ORTModelForSequenceClassification.from_pretrained(large_bundle, subfolder="onnx", file_name="model.onnx")
    inputs = AutoTokenizer.from_pretrained(large_bundle)([("Is it?", "Yes")], return_tensors="pt")
    with Scorer.open(large_bundle, precision="fp32") as scorer:
        assert model(**inputs).logits[0, 0].item() == pytest.approx(scorer.score([("Is it?", "Yes")])[0], abs=1e-5)


def test_a_specialised_axis_is_an_error(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx/model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match=r"input_ids of model\.onnx has the axes \['batch_size', 16\]"):
        check_graph(tmp_path / "model.onnx")


def counting_graph(path: Path, *, opset: int = 17, takes: Sequence[str] = ("input_ids",), gives: int | str = 1) -> Path:
    """Write a graph that sums the first of its inputs in each row."""
    nodes = [
        helper.make_node("Cast", [takes[0]], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ids", "axis"], ["logits"], keepdims=1),
    ]
    axes = ["batch_size", "sequence_length"]
    taken = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in takes]
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", gives])
    axis = numpy_helper.from_array(np.array([1]), "axis")
    graph = helper.make_graph(nodes, "sums", taken, [given], [axis])
    opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opset": 16}, r"model\.onnx has opset 16; at least 17 is needed"),
        ({"takes": ("input_ids", "bbox")}, r"model\.onnx takes input_ids, bbox; of a pair there are only input_ids, "),
        ({"takes": ("attention_mask",)}, r"model\.onnx takes attention_mask; of a pair there are only input_ids, "),
        ({"gives": "labels"}, r"logits of model\.onnx has the axes \['batch_size', 'labels'\]"),
    ],
    ids=str,
)
def test_a_graph_that_no_bundle_can_have_is_an_error(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    check_graph(counting_graph(tmp_path / "model.onnx"))
    with pytest.raises(GraphError, match=said):
        check_graph(counting_graph(tmp_path / "model.onnx", **changes))


def test_an_invalid_graph_is_an_error(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx/model.onnx")
    model.graph.node.reverse()
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match=r"onnx\.checker refuses"):
        check_graph(tmp_path / "model.onnx")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp16"])
def test_the_head_is_what_follows_the_last_layer(bundle: Path, precision: Precision) -> None:
    model = onnx.load(bundle / MODEL_FILES[precision], load_external_data=False)
    kinds = sorted(node.op_type for node in model.graph.node if node.name in head_nodes(model))
    assert [kind for kind in kinds if kind != "Cast"] == ["Gemm", "Gemm", "Tanh"]


def test_a_full_disk_is_an_error_that_names_the_graph(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx/model.onnx")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*copy\.onnx'"):
            save(model, tmp_path / "copy.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_libraries_that_write_graphs_are_heard_only_of_errors_and_what_was_set_before_comes_back(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    log = logging.getLogger("a_library")

    @quiet()
    def write_a_graph() -> None:
        sys.stdout.write("Validating ONNX model")
        warnings.warn("a tensor became a constant", stacklevel=1)
        log.warning("of no interest")
        log.error("an error")
        raise ValueError("what fails")

    caplog.set_level(logging.DEBUG)
    logging.disable(logging.INFO)
    try:
        with pytest.raises(ValueError, match="what fails"):
            write_a_graph()
        log.warning("of interest")
        log.info("disabled before")
    finally:
        logging.disable(logging.NOTSET)
    assert capsys.readouterr().out == ""
    assert caplog.messages == ["an error", "of interest"]
    assert not recwarn.list
