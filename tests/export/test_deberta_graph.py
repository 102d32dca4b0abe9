"""DeBERTa's graph: PyTorch's logits for pairs shorter and longer than its buckets, whatever the batch."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import DebertaV2Config, PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from cappy_export.graphs.deberta_cpu import distance_rows
from cappy_export.graphs.families import family_of
from cappy_export.graphs.files import head_nodes
from tests.support.direct_graphs import logits_of, opened, random_inputs, written
from tests.support.small_models import random_weights, torch_logits

BUCKETS, LONGEST, WORDS = 16, 200, 200
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
    "num_labels": 1,
}
V3: dict[str, Any] = {
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": BUCKETS,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
}
V2: dict[str, Any] = {"relative_attention": True, "pos_att_type": "p2c|c2p", "type_vocab_size": 2}


def random_model(**options: Any) -> PreTrainedModel:
    """A small DeBERTa with random weights, biases and norms."""
    return random_weights(DebertaV2Config(**{**SHAPE, **options}))


@cache
def usual(has_kernels: bool = False) -> onnxruntime.InferenceSession:
    """The session of GRAPH."""
    return opened(GRAPH, has_kernels=has_kernels)


MODEL = random_model(**V3)
GRAPH = written(MODEL)


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [5], [7, 6, 5], [LONGEST], [64, 1, 3, 129], [200, 11, 90]], ids=str)
def test_logits_are_pytorchs(lengths: list[int], has_kernels: bool) -> None:
    inputs = random_inputs(MODEL, lengths)
    found = logits_of(usual(has_kernels), inputs)
    assert found.shape == (len(lengths), 1)
    np.testing.assert_allclose(found, torch_logits(MODEL, inputs), rtol=0, atol=2e-5)


def test_scores_vary_by_far_more_than_these_tests_allow() -> None:
    assert logits_of(usual(), random_inputs(MODEL, list(range(3, 60)))).std() > 0.1


def test_distances_beyond_the_buckets_count() -> None:
    inputs = random_inputs(MODEL, [150])
    assert set(distance_rows(MODEL.config)[1:-1]) == set(range(1, 2 * BUCKETS))
    fewer = random_model(**{**V3, "max_relative_positions": LONGEST // 2})
    assert abs(torch_logits(fewer, inputs) - torch_logits(MODEL, inputs)).max() > 1e-3


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (V3, {"pos_att_type": "p2c|c2p", "norm_rel_ebd": "none"}),
        (V3, {"norm_rel_ebd": "none | Layer_Norm"}),
        (V3, {"pos_att_type": ["c2p"]}),
        (V3, {"pos_att_type": ["p2c"]}),
        (V3, {"share_att_key": False}),
        (V3, {"position_buckets": -1}),
        (V3, {"position_buckets": -1, "max_relative_positions": 30}),
        (V3, {"position_buckets": 0, "max_relative_positions": 0}),
        (V3, {"max_relative_positions": 60}),
        (V3, {"position_biased_input": True, "type_vocab_size": 2}),
        (V3, {"num_hidden_layers": 1, "attention_head_size": 8}),
        (V3, {"hidden_act": "relu", "pooler_hidden_act": "relu", "layer_norm_eps": 0.3}),
        (V2, {}),
        (V2, {"pos_att_type": ["c2p"], "num_attention_heads": 1}),
        (V2, {"share_att_key": True, "position_buckets": 10}),
    ],
    ids=str,
)
def test_what_a_config_may_say_is_in_the_graph(
    options: dict[str, Any], changes: dict[str, Any], has_kernels: bool
) -> None:
    model = random_model(**{**options, **changes})
    assert family_of(model.config.to_dict()) is not None
    inputs = random_inputs(model, [150, 3, 20])
    found = logits_of(opened(written(model), has_kernels=has_kernels), inputs)
    np.testing.assert_allclose(found, torch_logits(model, inputs), rtol=0, atol=2e-5)


def test_the_only_type_of_tokens_counts() -> None:
    model = random_model(**{**V2, "type_vocab_size": 1})
    inputs = random_inputs(model, [9, 20])
    inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    found = logits_of(opened(written(model)), inputs)
    np.testing.assert_allclose(found, torch_logits(model, inputs), rtol=0, atol=2e-5)


def test_the_kernel_refuses_a_pair_that_is_too_long_for_its_distances() -> None:
    with pytest.raises(Exception, match="pair 1 has 202 tokens, and there are rows for distances of at most 200"):
        logits_of(usual(has_kernels=True), random_inputs(MODEL, [7, LONGEST + 2]))


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_pair_has_one_score_alone_and_in_company(has_kernels: bool) -> None:
    inputs = random_inputs(MODEL, [150, 5, 64, 33])
    together = logits_of(usual(has_kernels), inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(axis=1)):
        alone = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        found = logits_of(usual(has_kernels), alone)
        np.testing.assert_allclose(found, together[row : row + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("buckets", "most"), [(256, -1), (256, 512), (64, 300), (-1, -1), (-1, 100)])
def test_the_table_of_distances_is_transformers_at_a_published_size(buckets: int, most: int) -> None:
    options = {"position_buckets": buckets, "max_relative_positions": most, "max_position_embeddings": 512}
    rows, most = distance_rows(DebertaV2Config(**options)), 512 if most < 1 else most
    span = most if buckets < 1 else buckets
    places = torch.empty(512, 1)
    relative = build_relative_position(places, places, bucket_size=buckets, max_position=most)[0]
    wanted = (relative + span).clamp(0, 2 * span - 1).numpy()
    query, key = np.indices((512, 512))
    np.testing.assert_array_equal(rows[512 + key - query], wanted)


def test_a_pair_longer_than_the_table_is_an_error() -> None:
    with pytest.raises(Exception, match="indices element out of data bounds"):
        logits_of(usual(), random_inputs(MODEL, [LONGEST + 1]))


def test_onnx_runtime_warns_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Sizes that shapes call by one name must be one size: else it plans memory that it cannot use."""
    logits_of(opened(GRAPH), random_inputs(MODEL, [20, 9, 14, 11]))
    assert capfd.readouterr().err == ""


def test_the_graph_is_valid_and_its_head_is_found() -> None:
    onnx.checker.check_model(GRAPH, full_check=True)
    assert head_nodes(GRAPH) == {"head/dense", "head/activation", "logits"}
    assert [entry.name for entry in GRAPH.graph.input] == ["input_ids", "attention_mask"]
    kinds = [node.op_type for node in GRAPH.graph.node if node.op_type.endswith("Attention")]
    assert kinds == ["DisentangledAttention", "DisentangledAttention", "FirstDisentangledAttention"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "silu"},
        {"pooler_hidden_act": "tanh"},
        {"relative_attention": False},
        {"pos_att_type": []},
        {"conv_kernel_size": 3},
        {"embedding_size": 16},
        {"attention_head_size": 24},
    ],
    ids=str,
)
def test_what_is_not_known_is_left_to_optimum(changes: dict[str, Any]) -> None:
    assert family_of({"model_type": "deberta-v2", **V3}) is not None
    assert family_of({"model_type": "deberta-v2", **V3, **changes}) is None


@pytest.mark.parametrize("told", ["c2p", "P2C|C2P", "|p2c ", ["c2p"]], ids=str)
def test_a_config_tells_as_to_transformers_what_its_distances_count_for(told: str | list[str]) -> None:
    assert family_of({"model_type": "deberta-v2", **V3, "pos_att_type": told}) is not None
