"""Graphs for GPUs, run on the CPU: PyTorch's logits, the right operators, and shapes that TensorRT can know."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from transformers.models.roberta.modeling_roberta import create_position_ids_from_input_ids

from cappy_engine.errors import GraphError
from cappy_engine.inputs import position_ids
from cappy_export.graphs.bert_cpu import encoder_model
from cappy_export.graphs.cuda import packing_counts
from cappy_export.graphs.stand_ins import emulated
from cappy_export.graphs.tensorrt import PARSED, check_operators, check_shapes
from cappy_export.graphs.writer import MICROSOFT
from cappy_export.precisions.calibration import activation_ranges
from cappy_export.precisions.int8_tensorrt import quantize_explicitly, smoothing_factors
from tests.support.direct_graphs import random_inputs
from tests.support.gpu_graphs import ATOL, WRITERS, logits_of, opened, written
from tests.support.small_models import LONGEST, SHAPE, random_model, torch_logits, weights_of

KINDS = ("roberta", "bert")
MODELS = {kind: random_model(kind) for kind in KINDS}
GRAPHS = {(writer, kind): written(writer, MODELS[kind]) for writer in WRITERS for kind in KINDS}
SESSIONS = {key: opened(graph) for key, graph in GRAPHS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "lengths",
    [[3], [LONGEST], [3, LONGEST], [1, 2, 3], [LONGEST, 3, 17, 17, 8, 40, 5], [9, 9, 9]],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_logits_are_pytorchs(writer: str, kind: str, lengths: list[int]) -> None:
    inputs = random_inputs(MODELS[kind], lengths)
    found = logits_of(SESSIONS[writer, kind], MODELS[kind], inputs)
    assert found.shape == (len(lengths), 1)
    np.testing.assert_allclose(found, torch_logits(MODELS[kind], inputs), rtol=0, atol=ATOL)


@pytest.mark.parametrize("key", SESSIONS, ids="-".join)
def test_scores_vary_by_far_more_than_these_tests_allow(key: tuple[str, str]) -> None:
    model = MODELS[key[1]]
    assert logits_of(SESSIONS[key], model, random_inputs(model, list(range(3, LONGEST)))).std() > 0.1


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=6),
    extra=st.integers(0, 9),
    writer=st.sampled_from(sorted(WRITERS)),
    kind=st.sampled_from(KINDS),
)
def test_padding_changes_no_score(lengths: list[int], extra: int, writer: str, kind: str) -> None:
    model, columns = MODELS[kind], min(LONGEST, max(lengths) + extra)
    padded = logits_of(SESSIONS[writer, kind], model, random_inputs(model, lengths, columns=columns))
    exact = random_inputs(model, lengths, columns=columns)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, :length] for name, value in exact.items()}
        np.testing.assert_allclose(padded[row], torch_logits(model, alone)[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("roberta", {"hidden_act": "relu"}),
        ("bert", {"num_hidden_layers": 1, "num_attention_heads": 1}),
        ("bert", {"type_vocab_size": 5, "layer_norm_eps": 0.3}),
        ("roberta", {"pad_token_id": 7, "max_position_embeddings": LONGEST + 8}),
    ],
)
def test_what_a_config_may_say_is_in_the_graph(writer: str, kind: str, changes: dict[str, Any]) -> None:
    model = random_model(kind, **changes)
    inputs = random_inputs(model, [LONGEST, 3, 20])
    found = logits_of(opened(written(writer, model)), model, inputs)
    np.testing.assert_allclose(found, torch_logits(model, inputs), rtol=0, atol=ATOL)


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 5))
def test_position_ids_are_those_of_transformers(rows: list[list[int]], padding: int) -> None:
    ids = np.array(rows, dtype=np.int64)
    expected = create_position_ids_from_input_ids(torch.from_numpy(ids), padding).numpy()
    np.testing.assert_array_equal(position_ids(ids, pad_token_id=padding), expected)


def test_the_graph_for_cuda_is_made_of_the_fused_operators() -> None:
    counts = Counter(node.op_type for node in GRAPHS["packed", "roberta"].graph.node)
    assert SHAPE["num_hidden_layers"] == 2
    wanted = packing_counts(2, has_gelu=True)
    assert wanted == {
        "RemovePadding": 1,
        "PackedMultiHeadAttention": 2,
        "SkipLayerNormalization": 4,
        "BiasGelu": 2,
    }
    assert {name: counts[name] for name in wanted} == wanted
    assert not counts.keys() & {"Softmax", "Erf", "Loop", "If"}
    relu = Counter(node.op_type for node in written("packed", random_model("roberta", hidden_act="relu")).graph.node)
    assert packing_counts(2, has_gelu=False) == {name: relu[name] for name in wanted if name != "BiasGelu"}
    assert "BiasGelu" not in relu


def test_the_stand_ins_stand_for_two_operators_only() -> None:
    graph = GRAPHS["packed", "roberta"]
    twin = emulated(copy.deepcopy(graph))
    changed = [
        (before.op_type, after.domain)
        for before, after in zip(graph.graph.node, twin.graph.node, strict=True)
        if before != after
    ]
    assert set(changed) == {("RemovePadding", "cappy.emulated"), ("PackedMultiHeadAttention", "cappy.emulated")}
    assert list(twin.graph.initializer) == list(graph.graph.initializer)


def test_a_bias_that_a_stand_in_would_leave_out_is_an_error() -> None:
    graph = copy.deepcopy(GRAPHS["packed", "roberta"])
    node = next(node for node in graph.graph.node if node.op_type == "PackedMultiHeadAttention")
    node.input[3] = "a_bias"
    with pytest.raises(GraphError, match=r"layer\.0/attention has a bias, and its stand-in adds none"):
        emulated(graph)


def test_the_stand_in_for_remove_padding_gives_what_its_source_says() -> None:
    # bert_padding.cu, getTokenOffset: sequences of 1, 2 and 4 tokens in rows of 4; offsets of tokens, then of padding.
    outputs = ["output", "offsets", "bounds", "longest"]
    types = [TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT32, TensorProto.INT32]
    graph = helper.make_graph(
        [helper.make_node("RemovePadding", ["input", "counts"], outputs, domain=MICROSOFT)],
        "padding",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", "length", 1]),
            helper.make_tensor_value_info("counts", TensorProto.INT32, ["batch"]),
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(outputs, types, strict=True)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(MICROSOFT, 1)]
    session = opened(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    rows = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    output, offsets, bounds, longest = session.run(None, {"input": rows, "counts": np.array([1, 2, 4], np.int32)})
    assert output.ravel().tolist() == [0, 4, 5, 8, 9, 10, 11]
    assert offsets.tolist() == [[0, 4, 5, 8], [9, 10, 11, 1], [2, 3, 6, 7]]
    assert bounds.tolist() == [0, 1, 3, 7]
    assert longest.tolist() == [4]


def test_the_real_operators_exist_for_cuda_only() -> None:
    # So the stand-ins are needed, and ONNX Runtime accepts the graph up to the kernels that the CPU lacks.
    with pytest.raises(Exception, match=r"(?s)NOT_IMPLEMENTED.*(RemovePadding|PackedMultiHeadAttention)"):
        onnxruntime.InferenceSession(
            GRAPHS["packed", "roberta"].SerializeToString(), providers=["CPUExecutionProvider"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_for_tensorrt_has_standard_operators_only(kind: str) -> None:
    graph = GRAPHS["plain", kind]
    check_operators(graph)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.op_type for node in graph.graph.node} <= PARSED
    casts = {node.output[0]: node for node in graph.graph.node if node.op_type == "Cast"}
    integers = {name for name, node in casts.items() if helper.get_node_attr_value(node, "to") != TensorProto.FLOAT}
    integers |= {entry.name for entry in graph.graph.input}
    assert not {name for node in graph.graph.node if node.op_type == "CumSum" for name in node.input} & integers


@pytest.mark.parametrize("writer", ["packed", "encoder"])
def test_other_graphs_are_refused_for_tensorrt(writer: str) -> None:
    model = MODELS["roberta"]
    graph = GRAPHS["packed", "roberta"] if writer == "packed" else encoder_model(model.config, weights_of(model))
    with pytest.raises(GraphError, match=r"not known to take .*(PackedMultiHeadAttention|NonZero)"):
        check_operators(graph)


def test_an_operator_of_another_domain_is_refused_for_tensorrt_whatever_its_name() -> None:
    graph = copy.deepcopy(GRAPHS["plain", "roberta"])
    next(node for node in graph.graph.node if node.op_type == "MatMul").domain = MICROSOFT
    with pytest.raises(GraphError, match="not known to take MatMul"):
        check_operators(graph)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [8, 16, LONGEST])
def test_every_shape_is_known_for_a_bucket(kind: str, length: int) -> None:
    before = GRAPHS["plain", kind].SerializeToString()
    check_shapes(GRAPHS["plain", kind], rows=2, length=length)
    assert GRAPHS["plain", kind].SerializeToString() == before, "it is written with dynamic axes"


def test_a_shape_that_depends_on_values_is_found() -> None:
    model = MODELS["roberta"]
    graph = encoder_model(model.config, weights_of(model))
    with pytest.raises(GraphError, match=r"no shape is known for kept"):
        check_shapes(graph, rows=2, length=16)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    broken = copy.deepcopy(GRAPHS["plain", "roberta"])
    entry = next(entry for entry in broken.graph.initializer if entry.name.endswith("layer.0.output.dense.matrix"))
    entry.CopyFrom(onnx.numpy_helper.from_array(np.zeros((7, 32), np.float32), entry.name))
    with pytest.raises(GraphError, match=r"shapes cannot be inferred for 2 x 16 tokens"):
        check_shapes(broken, rows=2, length=16)


@given(
    st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=8),
    st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_smoothing_leaves_the_product_as_it_is(activation: list[float], weights: list[float], share: float) -> None:
    size = min(len(activation), len(weights))
    first, second = np.array(activation[:size], np.float32), np.array(weights[:size], np.float32)
    factors = smoothing_factors(first, second, share)
    assert factors.shape == (size,)
    assert (factors > 0).all()
    assert np.isfinite(factors).all()
    # What is below 1e-30 has too few bits left in float32 to tell.
    np.testing.assert_allclose((first / factors) * (second * factors), first * second, rtol=1e-5, atol=1e-30)


def test_smoothing_moves_the_differences_between_channels_into_the_weights() -> None:
    activation, weights = np.array([30, 1, 4], np.float32), np.array([0.5, 2, 1], np.float32)
    all_moved, none_moved = (smoothing_factors(activation, weights, share) for share in (1.0, 0.0))
    np.testing.assert_allclose(activation / all_moved, (activation / all_moved)[0], rtol=1e-5)
    np.testing.assert_allclose(weights * none_moved, (weights * none_moved)[0], rtol=1e-5)


def test_channels_that_are_always_0_have_scales_above_0_in_8_bits(tmp_path: Path) -> None:
    """As of values that a pruning took out. TensorRT takes no scale of 0."""
    model = random_model("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer.0.attention.self.value" in name:
                parameter.zero_()
            elif "layer.1.intermediate.dense.weight" in name:
                parameter[3] = 0
    onnx.save(written("plain", model), tmp_path / "model.onnx")
    inputs = random_inputs(model, [LONGEST, 3, 20])
    quantize_explicitly(
        tmp_path / "model.onnx", tmp_path / "int8.onnx", activation_ranges(tmp_path / "model.onnx", [inputs])
    )
    quantized = onnx.load(tmp_path / "int8.onnx")
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in quantized.graph.initializer}
    scales = [stored[node.input[1]] for node in quantized.graph.node if "quantizelinear" in node.op_type.lower()]
    assert len(scales) > 12
    assert all((scale > 0).all() for scale in scales)
    found, wanted = logits_of(opened(quantized), model, inputs), torch_logits(model, inputs)
    assert np.abs(found - wanted).max() < 0.2 * wanted.std()
