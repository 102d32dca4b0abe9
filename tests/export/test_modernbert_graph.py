"""ModernBERT's graph: PyTorch's logits for pairs shorter and longer than its window, whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from transformers import ModernBertConfig, PreTrainedModel

from cappy_export.graphs.families import family_of
from cappy_export.graphs.files import head_nodes
from tests.support.direct_graphs import logits_of, opened, random_inputs, written
from tests.support.small_models import random_weights, torch_logits

WINDOW, LONGEST, WORDS = 10, 300, 200
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "local_attention": WINDOW,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 1,
    "num_labels": 1,
    "reference_compile": False,
}


def random_model(**changes: Any) -> PreTrainedModel:
    """A small ModernBERT with random weights, of layers 0 and 3 with full attention and two with local attention."""
    return random_weights(ModernBertConfig(**{**SHAPE, "classifier_pooling": "mean", **changes}))


MODEL = random_model()
GRAPH = written(MODEL)
OF_FIRST = written(random_model(classifier_pooling="cls"))


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize("lengths", [[1], [5], [7, 6, 5], [LONGEST], [64, 65, 3, 129], [200, 11, 90]], ids=str)
def test_logits_are_pytorchs(lengths: list[int], has_kernels: bool) -> None:
    inputs = random_inputs(MODEL, lengths)
    found = logits_of(opened(GRAPH, has_kernels=has_kernels), inputs)
    assert found.shape == (len(lengths), 1)
    np.testing.assert_allclose(found, torch_logits(MODEL, inputs), rtol=0, atol=2e-5)


def test_scores_vary_by_far_more_than_these_tests_allow() -> None:
    assert logits_of(opened(GRAPH), random_inputs(MODEL, list(range(3, 60)))).std() > 0.1


def test_the_window_counts() -> None:
    wide = random_model(local_attention=WINDOW + 2)
    inputs = random_inputs(MODEL, [80])
    assert abs(torch_logits(wide, inputs) - torch_logits(MODEL, inputs)).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"classifier_pooling": "cls"},
        {"classifier_pooling": "cls", "num_hidden_layers": 2},
        {"classifier_pooling": "cls", "num_hidden_layers": 1},
        {"classifier_pooling": "cls", "attention_bias": True, "mlp_bias": True, "norm_bias": True},
        {"num_hidden_layers": 2},
        {"global_attn_every_n_layers": 1},
        {"local_rope_theta": 160000.0},
        {"local_rope_theta": None},
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
        {"hidden_activation": "relu", "classifier_activation": "relu", "norm_eps": 0.3},
        {"local_attention": 2, "num_attention_heads": 1},
    ],
    ids=str,
)
def test_what_a_config_may_say_is_in_the_graph(changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    assert family_of(model.config.to_dict()) is not None
    inputs = random_inputs(model, [70, 3, 20])
    found = logits_of(opened(written(model)), inputs)
    np.testing.assert_allclose(found, torch_logits(model, inputs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("graph", [GRAPH, OF_FIRST], ids=["mean", "cls"])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_pair_has_one_score_alone_and_in_company(has_kernels: bool, graph: onnx.ModelProto) -> None:
    session = opened(graph, has_kernels=has_kernels)
    inputs = random_inputs(MODEL, [150, 5, 64, 33])
    together = logits_of(session, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(axis=1)):
        alone = {name: value[row : row + 1, :length] for name, value in inputs.items()}
        np.testing.assert_allclose(logits_of(session, alone), together[row : row + 1], rtol=0, atol=1e-6)


def test_the_graph_is_valid_and_its_head_is_found() -> None:
    onnx.checker.check_model(GRAPH, full_check=True)
    assert {"head/mean", "head/dense", "head/norm", "logits"} <= head_nodes(GRAPH)
    assert not [name for name in head_nodes(GRAPH) if name.startswith(("layer.", "final_norm"))]
    assert len([node for node in GRAPH.graph.node if node.op_type == "GeGlu"]) == 4  # it has a kernel, as in int8
    kinds = [node.op_type for node in GRAPH.graph.node if node.op_type.endswith("Attention")]
    assert kinds == [
        "RotaryAttention",
        "LocalRotaryAttention",
        "LocalRotaryAttention",
        "RotaryAttention",
        "FirstAttention",
    ]


def test_the_last_layer_computes_what_is_read() -> None:
    """A head that reads the first token leaves one row for each pair, from the last layer's attention on."""
    onnx.checker.check_model(OF_FIRST, full_check=True)
    assert head_nodes(OF_FIRST) == {"head/dense", "head/activation", "head/norm", "logits"}
    kinds = [node.op_type for node in OF_FIRST.graph.node if node.op_type.endswith("Attention")]
    assert kinds == ["RotaryAttention", "LocalRotaryAttention", "LocalRotaryAttention", "FirstRotaryAttention"]
    # A local last layer would see near tokens alone.
    local = written(random_model(classifier_pooling="cls", num_hidden_layers=3))
    assert "FirstRotaryAttention" not in {node.op_type for node in local.graph.node}


@pytest.mark.parametrize("changes", [{"hidden_activation": "silu"}, {"classifier_activation": "silu"}], ids=str)
def test_other_activations_are_left_to_optimum(changes: dict[str, str]) -> None:
    assert family_of({"model_type": "modernbert", **changes}) is None
    assert family_of({"model_type": "modernbert"}) is not None
