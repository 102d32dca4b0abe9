"""int8 bundles: their scores in any batch, products that stay in float32, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine import Scorer
from cappy_engine.bundle import MODEL_FILES, open_bundle
from cappy_engine.errors import ExportError, GraphError
from cappy_engine.native.operands import GROUP, PANEL
from cappy_engine.options import Mode
from cappy_engine.tokenizer import PairTokenizer
from cappy_export import ExportOptions, export
from cappy_export.precisions.calibration import CalibrationPairs
from cappy_export.precisions.embeddings import MIN_TABLE_ROWS
from cappy_export.precisions.int8 import products_with_weights, quantize
from cappy_export.proof.pairs import default_pairs


@pytest.mark.slow
def test_a_named_product_stays_in_float32_and_the_others_do_not(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(precisions=("fp32", "int8"), float32_products=("layer.1/output/dense",))
    manifest = export(checkpoint, tmp_path / "bundle", options)
    [kept] = manifest["graphs"]["int8"]["products_in_fp32"]
    assert "layer.1/output/dense" in kept
    assert products_with_weights(tmp_path / "bundle" / MODEL_FILES["int8"]) == [kept]
    assert (
        len(products_with_weights(tmp_path / "bundle" / MODEL_FILES["fp32"])) == 4 + 5
    )  # the last layer's queries are apart


@pytest.mark.slow
def test_a_product_that_is_not_there_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    options, said = ExportOptions(precisions=("fp16", "bf16", "int8"), float32_products=("layer.7",)), list[str]()
    with pytest.raises(ExportError, match=r"no matrix product is named 'layer\.7'; there are .*layer\.1/output"):
        export(checkpoint, tmp_path / "bundle", options, say=said.append)
    assert not (tmp_path / "bundle").exists()
    assert said[-1] == "building the fp32 graph", "nothing is converted before"


def test_int8_has_its_words_in_12_bits_and_the_manifest_says_how_it_was_made(bundle: Path) -> None:
    model = onnx.load(str(bundle / MODEL_FILES["int8"]))
    tables = [entry for entry in model.graph.initializer if len(entry.dims) == 2 and entry.dims[0] >= MIN_TABLE_ROWS]
    assert [entry.data_type for entry in tables if entry.dims[1] > 1] == [TensorProto.INT8, TensorProto.UINT8]
    assert "rotated in blocks" in open_bundle(bundle).manifest.document["graphs"]["int8"]["method"]


def test_int8_is_calibrated_on_every_pair_of_the_package(bundle: Path, tmp_path: Path) -> None:
    encoded = PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512).encode(default_pairs())
    every = CalibrationPairs(encoded, pad_token_id=1).inputs(len(encoded))
    source = Path(shutil.copyfile(bundle / MODEL_FILES["fp32"], tmp_path / "model.onnx"))
    quantize(source, tmp_path / "q.onnx", every)
    found, expected = (
        {entry.name: entry for entry in onnx.load(path).graph.initializer if entry.data_type == TensorProto.INT8}
        for path in (tmp_path / "q.onnx", bundle / MODEL_FILES["int8"])
    )
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        steps = numpy_helper.to_array(entry)
        assert np.mean(numpy_helper.to_array(found[name]) == steps) > 0.999, name


def test_int8_without_calibration_is_an_error(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"  # a copy: a calibration writes beside its model, and other tests read the bundle
    shutil.copyfile(bundle / MODEL_FILES["fp32"], source)
    with pytest.raises(GraphError, match="needs pairs to calibrate on"):
        quantize(source, tmp_path / "q.onnx", [])


@pytest.mark.parametrize("budget", [1, 200, 100_000])
@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_an_int8_score_does_not_depend_on_the_batch(bundle: Path, budget: int, mode: Mode) -> None:
    pairs = default_pairs()[::4]
    with Scorer.open(bundle, device="cpu", precision="int8", threads=2, mode=mode) as scorer:
        alone = np.concatenate([scorer.score([pair]) for pair in pairs])
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(pairs))[: len(pairs) - 5 * seed]
            found = scorer.score_pairs([pairs[place] for place in order], max_batch_tokens=budget).scores
            np.testing.assert_allclose(found, alone[order], rtol=0, atol=1e-6)


def test_int8_logits_do_not_depend_on_padding_or_neighbours(bundle: Path) -> None:
    session = onnxruntime.InferenceSession(bundle / MODEL_FILES["int8"], providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    lengths = np.array([3, 64, 17, 9, 30, 5, 48, 31])
    mask = (np.arange(80) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, random.integers(5, 1000, mask.shape), 1)
    feeds = {"input_ids": ids, "attention_mask": mask}
    alone = np.concatenate(
        [
            session.run(["logits"], {name: value[row : row + 1, :length] for name, value in feeds.items()})[0]
            for row, length in enumerate(lengths)
        ]
    )
    for rows in (np.arange(8), np.arange(8)[::-1], np.array([0, 0, 5]), np.array([1])):
        found = session.run(["logits"], {name: value[rows] for name, value in feeds.items()})[0]
        np.testing.assert_allclose(found, alone[rows], rtol=0, atol=1e-6)


def test_int8_is_written_with_the_operators_of_cappy_and_the_head_in_float32(bundle: Path) -> None:
    nodes = Counter(node.op_type for node in onnx.load(bundle / MODEL_FILES["int8"]).graph.node)
    products = {name: nodes[name] for name in ("Linear", "LinearGelu", "LinearNorm", "MatMul", "Gemm")}
    assert products == {"Linear": 3, "LinearGelu": 2, "LinearNorm": 4, "MatMul": 0, "Gemm": 2}
    assert (nodes["Attention"], nodes["FirstAttention"]) == (1, 1)
    # Both layers read four activations, the last one also the first tokens.
    assert {name: nodes[name] for name in nodes if name.startswith("Quantize")} == {"QuantizeRotatedRows": 9}


def test_int8_weights_are_signed_per_channel_and_in_panels(bundle: Path) -> None:
    model = onnx.load(bundle / MODEL_FILES["int8"])
    stored = {entry.name: entry for entry in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type.startswith("Linear")]
    for node in products:
        weights, scales = stored[node.input[2]], stored[node.input[3]]
        assert weights.data_type == TensorProto.INT8
        assert list(weights.dims[2:]) == [PANEL, GROUP]
        assert list(scales.dims) == [weights.dims[0] * PANEL]
    assert len({node.input[2] for node in products}) == len(products) == 9
    assert not [name for name in stored if name.endswith(".matrix") and "encoder" in name]


def test_a_graph_without_products_cannot_be_quantised(tmp_path: Path) -> None:
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "logits"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["logits"])], "g", [x], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="there are none"):
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [])
