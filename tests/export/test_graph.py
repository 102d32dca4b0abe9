"""The exported graph: dynamic axes, fusions that are demanded, and the fp16 and int8 models made from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cappy_engine.errors import GraphError
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.graphs.optimum import (
    build_fused_graph,
    build_graph,
    check_fusions,
    check_graph,
    count_nodes,
    demanded_fusions,
    head_nodes,
)
from cappy_export.precisions.fp16 import convert_to_half, take_census
from cappy_export.precisions.int8 import quantize

RNG = np.random.default_rng(0)


def random_inputs(batch: int, length: int) -> dict[str, npt.NDArray[np.int64]]:
    ids = RNG.integers(5, 1000, (batch, length))
    ids[:, 0] = 0
    mask = np.ones_like(ids)
    for row in range(1, batch):  # every row but the first has padding
        kept = int(RNG.integers(2, length + 1))
        ids[row, kept:], mask[row, kept:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("length", [3, 4, 17, 128, 511, 512])
def test_any_batch_and_length_gives_pytorchs_logits(checkpoint: Path, bundle: Path, batch: int, length: int) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    session = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    inputs = random_inputs(batch, length)
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    (found,) = session.run(["logits"], inputs)
    assert found.shape == (batch, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def fused(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph that fp16 is made from."""
    path = tmp_path_factory.mktemp("fused") / "fused.onnx"
    _, facts = build_fused_graph(open_checkpoint(checkpoint), path)
    assert (facts["written_by"], facts["unpadded"]) == ("optimum", False)
    return path


def test_roberta_is_written_without_padding_and_its_shape_is_told(checkpoint: Path, tmp_path: Path) -> None:
    shape, facts = build_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")
    assert facts == {"written_by": "cappy-export", "opset": 18, "unpadded": True}
    assert (shape["layers"], shape["heads"], shape["hidden_size"]) == (2, 2, 32)
    weights = load_file(checkpoint / "model.safetensors")
    assert shape["parameters"] == sum(value.numel() for name, value in weights.items() if "position_ids" not in name)


def test_every_layer_is_fused(fused: Path) -> None:
    nodes = count_nodes(fused)
    assert (nodes["Attention"], nodes["SkipLayerNormalization"], nodes["BiasGelu"]) == (2, 4, 2)
    assert nodes["Softmax"] == nodes["Erf"] == 0


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (5, 128)])
def test_the_fused_graph_gives_the_written_ones_logits(bundle: Path, fused: Path, batch: int, length: int) -> None:
    inputs = random_inputs(batch, length)
    written, found = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
        for path in (bundle / "onnx/model.onnx", fused)
    )
    np.testing.assert_allclose(found, written, atol=1e-5)


def test_fewer_fusions_than_layers_are_an_error() -> None:
    config = {"model_type": "roberta", "hidden_act": "gelu"}
    complete = {"Attention": 24, "SkipLayerNormalization": 48, "BiasGelu": 24}
    assert demanded_fusions(config, layers=24) == complete
    check_fusions(complete, config, layers=24)
    with pytest.raises(GraphError, match="only 23 of 24 Attention"):
        check_fusions({**complete, "Attention": 23}, config, layers=24)
    with pytest.raises(GraphError, match="0 of 24 BiasGelu"):
        check_fusions({"Attention": 24, "SkipLayerNormalization": 48}, config, layers=24)


def test_only_an_exact_gelu_must_be_fused_with_its_bias() -> None:
    assert "BiasGelu" not in demanded_fusions({"model_type": "bert", "hidden_act": "relu"}, layers=2)
    assert demanded_fusions({"model_type": "deberta-v2"}, layers=2) == {}


def test_a_specialised_axis_is_an_error(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx/model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match=r"input_ids of model\.onnx has the axes \['batch_size', 16\]"):
        check_graph(tmp_path / "model.onnx")


def test_an_invalid_graph_is_an_error(bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(bundle / "onnx/model.onnx")
    model.graph.node.reverse()
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(GraphError, match=r"onnx\.checker refuses"):
        check_graph(tmp_path / "model.onnx")


def test_fp16_holds_half_the_bytes_and_a_head_in_fp32(bundle: Path) -> None:
    sizes = {name: (bundle / f"onnx/{name}.onnx").stat().st_size for name in ("model", "model_fp16")}
    assert sizes["model_fp16"] < 0.6 * sizes["model"]
    half = onnx.load(bundle / "onnx/model_fp16.onnx")
    types = {entry.name: entry.data_type for entry in half.graph.initializer}
    assert all(types[name] == TensorProto.FLOAT for name in types if name.startswith("classifier"))
    assert TensorProto.FLOAT16 in types.values()
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_the_head_is_what_follows_the_last_layer(bundle: Path) -> None:
    model = onnx.load(bundle / "onnx/model.onnx")
    kinds = sorted(node.op_type for node in model.graph.node if node.name in head_nodes(model))
    assert kinds == ["Gemm", "Gemm", "Tanh"]


def test_a_node_that_overflows_fp16_stays_in_fp32(fused: Path, tmp_path: Path) -> None:
    """Scale one value up to beyond 65504 and down again: the float32 scores stay, a plain fp16 graph gives NaN."""
    source, big, half = fused, tmp_path / "big.onnx", tmp_path / "half.onnx"
    model = onnx.load(source)
    node = next(node for node in model.graph.node if node.op_type == "BiasGelu")
    output = node.output[0]
    node.output[0] = f"{output}_raw"
    for name, value in (("up", 1e7), ("down", 1e-7)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), name))
    place = list(model.graph.node).index(node) + 1
    model.graph.node.insert(place, helper.make_node("Mul", [f"{output}_raw", "up"], ["huge"], name="scale_up"))
    model.graph.node.insert(place + 1, helper.make_node("Mul", ["huge", "down"], [output], name="scale_down"))
    onnx.save(model, big)
    inputs = random_inputs(2, 40)
    facts = convert_to_half(big, half, [inputs])
    assert "scale_up" in facts["overflowing_in_fp32"]
    assert facts["largest_value"] > 65504
    expected, found = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
        for path in (source, half)
    )
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_the_census_sees_the_largest_value_of_every_tensor(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "x"], ["square"]), helper.make_node("Neg", ["square"], ["logits"])]
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "logits"))
    graph = helper.make_graph(nodes, "g", [x], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    feeds = [{"x": np.array(values, dtype=np.float32)} for values in ([1, -3], [2, 0])]
    assert take_census(tmp_path / "m.onnx", feeds).largest == {"square": 9.0, "logits": 9.0}  # type: ignore[arg-type]


def test_int8_quantises_every_product_with_weights_and_nothing_of_the_head(bundle: Path) -> None:
    nodes = count_nodes(bundle / "onnx/model_quantized.onnx")
    assert nodes["MatMulIntegerToFloat"] == 2 * 6
    assert (nodes["MatMul"], nodes["Gemm"], nodes["BiasGelu"], nodes["Gelu"]) == (0, 2, 2, 0)


def test_int8_weights_are_signed_and_per_channel(bundle: Path) -> None:
    model = onnx.load(bundle / "onnx/model_quantized.onnx")
    stored = {entry.name: entry for entry in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    for node in products:
        weights, scales = stored[node.input[1]], stored[node.input[3]]
        assert weights.data_type == TensorProto.INT8
        assert list(scales.dims) == [weights.dims[1]]
    assert len({node.input[1] for node in products}) == 12
    assert not [name for name in stored if name.endswith(".matrix") and "encoder" in name]


def test_weights_beyond_one_file_are_refused_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy_export.graphs.optimum.MAX_BYTES", 1000)
    with pytest.raises(GraphError, match="models up to 2 GiB"):
        build_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")


def test_weights_in_half_precision_count_as_the_float32_that_they_become(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = shutil.copytree(checkpoint, tmp_path / "half", ignore=shutil.ignore_patterns("*.bin", "*.msgpack"))
    weights = {name: value.bfloat16() for name, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors")
    monkeypatch.setattr("cappy_export.graphs.optimum.MAX_BYTES", (half / "model.safetensors").stat().st_size + 1)
    with pytest.raises(GraphError, match="models up to 2 GiB"):
        build_graph(open_checkpoint(half), tmp_path / "model.onnx")


def test_a_graph_without_products_cannot_be_quantised(tmp_path: Path) -> None:
    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "logits"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["logits"])], "g", [x], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="there are none"):
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx")
