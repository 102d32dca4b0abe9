"""Weights in a file beside the graph, as a large model's are: written once, checked, and read by other tools."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer

from cappy_engine import Scorer
from cappy_engine.bundle import EXTERNAL_SUFFIX, MODEL_FILES
from cappy_engine.errors import BundleError
from cappy_engine.options import Precision
from cappy_export import export


@pytest.fixture(scope="module")
def large_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was exported as a large model is: with its weights beside the graphs."""
    path = tmp_path_factory.mktemp("large") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cappy_export.graphs.optimum.EXTERNAL_BYTES", 0)
        patch.setattr("cappy_export.graphs.optimum.EXTERNAL_TENSOR_BYTES", 256)
        export(checkpoint, path, precisions=["fp32", "fp16", "int8"], keep=["fp32", "int8"])
    return path


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
