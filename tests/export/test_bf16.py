"""bf16 bundles: half of fp32's weights, scores near PyTorch's, and the same with kernels and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cappy_engine import Scorer
from cappy_engine.bundle import MODEL_FILES, open_bundle
from cappy_engine.cpu.kernels import MULTIPLY_BF16, VARIABLE, WIDENED, find_kernels
from cappy_engine.errors import GraphError
from cappy_engine.native.reference import bf16_bits, bf16_values
from cappy_export.graphs.operators import DOMAIN, operators_of
from cappy_export.precisions.bf16 import convert_to_bf16
from cappy_export.proof.pairs import default_pairs
from tests.support.checkpoints import random_inputs


def test_a_bf16_file_holds_half_the_bytes_and_a_head_in_fp32(bundle: Path) -> None:
    sizes = {name: (bundle / MODEL_FILES[name]).stat().st_size for name in ("fp32", "bf16")}
    assert sizes["bf16"] < 0.65 * sizes["fp32"], "positions and functions are a part of so small a model"
    path = bundle / MODEL_FILES["bf16"]
    onnx.checker.check_model(str(path), full_check=True)
    types = {entry.name: entry.data_type for entry in onnx.load(path).graph.initializer}
    assert {kind for name, kind in types.items() if name.startswith("classifier")} == {TensorProto.FLOAT}
    assert TensorProto.BFLOAT16 in types.values()
    facts = open_bundle(bundle).manifest.document["graphs"]["bf16"]
    assert facts["operators"] == operators_of(path)
    assert (facts["converted"], facts["products_in_fp32"]) == ({"Gemm": 9, "embeddings": 1}, [])


def test_scores_are_near_with_kernels_and_without(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, scores = default_pairs()[::3], {}
    with Scorer.open(bundle, device="cpu", precision="fp32", threads=1) as scorer:
        exact = scorer.score(pairs)
    for asked in ("none", "auto"):
        monkeypatch.setenv(VARIABLE, asked)
        with Scorer.open(bundle, device="cpu", precision="bf16", threads=2) as scorer:
            scores[asked], told = scorer.score(pairs), scorer.info.kernels
    assert 0 < np.abs(scores["none"] - exact).max() < 0.1 * exact.std()
    # Sums in another order may round a value of the next product the other way.
    assert np.abs(scores["auto"] - scores["none"]).max() < 0.02 * exact.std()
    kernels = find_kernels()
    if kernels.library is not None:
        assert told == (kernels.used if kernels.used in MULTIPLY_BF16 else f"{kernels.used} ({WIDENED})")


def test_a_product_is_its_arithmetic_in_numpy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights, bias = random.standard_normal((6, 32)).astype(np.float32), random.standard_normal(32).astype(np.float32)
    ends = random.standard_normal((32, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["sum"], "dense"),
        helper.make_node("MatMul", ["sum", "e"], ["y"], "odd"),
        helper.make_node("LayerNormalization", ["y", "ones"], ["z"], "norm"),
    ]
    constants = {"w": weights, "b": bias, "e": ends, "ones": np.ones(5, np.float32)}
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    source, out = tmp_path / "source.onnx", tmp_path / "bf16.onnx"
    onnx.save(model, source)
    with pytest.raises(GraphError, match=r"bf16\.onnx takes x"):  # it has no model's inputs, but is written
        convert_to_bf16(source, out)
    written = onnx.load(out)
    assert [(node.op_type, node.domain) for node in written.graph.node][:2] == [("Bf16Linear", DOMAIN), ("MatMul", "")]
    written.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 32]))
    x = random.standard_normal((3, 6)).astype(np.float32)
    session = onnxruntime.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = bf16_values(bf16_bits(x)) @ bf16_values(bf16_bits(weights)) + bias
    np.testing.assert_allclose(session.run(["sum"], {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)


def test_an_architecture_that_optimum_exports_becomes_bf16_too(fused: Path, tmp_path: Path) -> None:
    out, inputs = tmp_path / "bf16.onnx", random_inputs(2, 40)
    facts = convert_to_bf16(fused, out)
    assert facts["products_in_fp32"] == []
    assert facts["converted"]["Attention"] == 2
    found, expected = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
        for path in (out, fused)
    )
    assert 0 < np.abs(found - expected).max() < 0.05


@pytest.mark.parametrize(
    ("inner", "columns", "bias"),
    [
        pytest.param(8, 8, None, id="half a panel"),
        pytest.param(7, 32, (32,), id="half a group"),
        pytest.param(8, 32, (1, 32), id="a bias of two dimensions"),
        pytest.param(8, 32, (1,), id="one value as bias"),
        pytest.param(8, 32, "computed", id="a bias that is computed"),
    ],
)
def test_a_graph_none_of_whose_products_fits_the_operators_is_an_error(
    tmp_path: Path, inner: int, columns: int, bias: tuple[int, ...] | str | None
) -> None:
    """It would be a float32 model under the name of bf16."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inner])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", columns])
    constants = {"w": np.ones((inner, columns), np.float32), "s": np.ones(columns, np.float32)}
    nodes = [
        helper.make_node("MatMul" if bias is None else "Gemm", ["x", "w"] + ["b"] * (bias is not None), ["y"], "dense"),
        helper.make_node("LayerNormalization", ["y", "s"], ["logits"], "norm"),
    ]
    if bias == "computed":
        nodes.insert(0, helper.make_node("Neg", ["s"], ["b"], "negative"))
    elif isinstance(bias, tuple):
        constants["b"] = np.ones(bias, np.float32)
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [out], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(GraphError, match="no matrix product could be converted to bf16; there are dense"):
        convert_to_bf16(tmp_path / "m.onnx", tmp_path / "out.onnx")
