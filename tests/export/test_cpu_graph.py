"""Encoders that are written operator by operator: PyTorch's logits, whatever the batch, and nothing for padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_export.graphs.families import family_of
from cappy_export.graphs.writer import is_written_for_gpus
from tests.support.direct_graphs import logits_of, opened, random_inputs, written
from tests.support.small_models import LONGEST, SHAPE, WORDS, Inputs, random_model, torch_logits

KINDS = ("roberta", "bert", "electra")
ROUNDING = {"roberta": 1e-5, "bert": 1e-5, "electra": 2e-5}
"""How far logits may be from PyTorch's. ELECTRA's are larger: no tanh bounds its head."""
PROJECTIONS = ((0, "query_key_value"), (1, "query"), (1, "key_value"))
"""The projections of both layers: in the last one only the first token asks."""
MODELS = {kind: random_model(kind) for kind in KINDS}
SESSIONS = {kind: opened(written(model)) for kind, model in MODELS.items()}


def row_of(inputs: Inputs, row: int) -> Inputs:
    """One pair of a batch that is padded on the right, without its padding."""
    length = int(inputs["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length] for name, value in inputs.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths",
    [[3], [17], [LONGEST], [3, LONGEST], [1, 2, 3], [LONGEST, 3, 17, 17, 8, 40, 5], [9, 9, 9]],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_logits_are_pytorchs(kind: str, lengths: list[int]) -> None:
    inputs = random_inputs(MODELS[kind], lengths)
    found = logits_of(SESSIONS[kind], inputs)
    assert found.shape == (len(lengths), 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch_logits(MODELS[kind], inputs), rtol=0, atol=ROUNDING[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_vary_by_far_more_than_these_tests_allow(kind: str) -> None:
    assert logits_of(SESSIONS[kind], random_inputs(MODELS[kind], list(range(3, LONGEST)))).std() > 0.1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("roberta", {"hidden_act": "relu"}),
        ("bert", {"hidden_act": "relu"}),
        ("roberta", {"num_hidden_layers": 1}),
        ("bert", {"num_hidden_layers": 1, "num_attention_heads": 1}),
        ("roberta", {"layer_norm_eps": 0.3}),
        ("bert", {"type_vocab_size": 5, "layer_norm_eps": 0.3}),
        ("roberta", {"pad_token_id": 7, "max_position_embeddings": LONGEST + 8}),
        ("electra", {"embedding_size": 32}),
        ("electra", {"embedding_size": 48, "hidden_act": "relu"}),
        ("electra", {"num_hidden_layers": 1, "type_vocab_size": 5, "layer_norm_eps": 0.3}),
    ],
)
def test_what_a_config_may_say_is_in_the_graph(kind: str, changes: dict[str, Any]) -> None:
    model = random_model(kind, **changes)
    assert family_of(model.config.to_dict()) is not None
    inputs = random_inputs(model, [LONGEST, 3, 20])
    session = opened(written(model))
    np.testing.assert_allclose(logits_of(session, inputs), torch_logits(model, inputs), rtol=0, atol=ROUNDING[kind])
    alone = row_of(inputs, 2)
    np.testing.assert_allclose(logits_of(session, alone), torch_logits(model, alone), rtol=0, atol=ROUNDING[kind])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=9),
    more_columns=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_a_pair_has_one_score_alone_in_company_and_with_more_padding(
    kind: str, lengths: list[int], more_columns: int, seed: int
) -> None:
    columns = min(LONGEST, max(lengths) + more_columns)
    inputs = random_inputs(MODELS[kind], lengths, columns=columns, seed=seed)
    together = logits_of(SESSIONS[kind], inputs)
    alone = [logits_of(SESSIONS[kind], row_of(inputs, row)) for row in range(len(lengths))]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-6)
    backwards = {name: value[::-1] for name, value in inputs.items()}
    np.testing.assert_allclose(logits_of(SESSIONS[kind], backwards)[::-1], together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[11], [11, 30, 4]], ids=["alone", "in company"])
def test_what_stands_in_padded_places_changes_nothing(kind: str, lengths: list[int]) -> None:
    inputs = random_inputs(MODELS[kind], lengths, columns=40)
    before = logits_of(SESSIONS[kind], inputs)
    is_padded = inputs["attention_mask"] == 0
    for name in set(inputs) - {"attention_mask"}:
        inputs[name][is_padded] = 1 if name == "token_type_ids" else np.arange(is_padded.sum()) % WORDS
    np.testing.assert_array_equal(logits_of(SESSIONS[kind], inputs), before)


@pytest.mark.parametrize("lengths", [[11], [11, 30, 4]], ids=["alone", "in company"])
def test_padding_on_the_left_leaves_robertas_scores_as_they_are(lengths: list[int]) -> None:
    """Its positions are counted from the first token that is none of padding."""
    inputs = random_inputs(MODELS["roberta"], lengths, columns=40)
    on_the_left = {
        name: np.stack([np.roll(row, 40 - length) for row, length in zip(value, lengths, strict=True)])
        for name, value in inputs.items()
    }
    expected = logits_of(SESSIONS["roberta"], inputs)
    np.testing.assert_allclose(logits_of(SESSIONS["roberta"], on_the_left), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_padding_on_the_left_moves_berts_positions_as_in_pytorch(count: int) -> None:
    """Its positions are the columns, in transformers too: PyTorch is given the pair alone, and its columns."""
    inputs = random_inputs(MODELS["bert"], [11] * count)
    shift = 7
    moved = {name: np.pad(value, ((0, 0), (shift, 0))) for name, value in inputs.items()}
    expected = torch_logits(MODELS["bert"], {**inputs, "position_ids": np.arange(11)[None, :] + shift})
    np.testing.assert_allclose(logits_of(SESSIONS["bert"], moved), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_paddings_id_within_a_text_is_a_token_as_in_pytorch(kind: str) -> None:
    inputs = random_inputs(MODELS[kind], [20, 9])
    inputs["input_ids"][0, [4, 5, 11]] = MODELS[kind].config.pad_token_id
    found = logits_of(SESSIONS[kind], inputs)
    np.testing.assert_allclose(found, torch_logits(MODELS[kind], inputs), rtol=0, atol=ROUNDING[kind])


def test_of_several_token_types_robertas_texts_have_the_first() -> None:
    """Its tokenizer gives all tokens type 0, and so do transformers where none are told."""
    model = random_model("roberta", type_vocab_size=2)
    inputs = random_inputs(model, [20, 9])
    del inputs["token_type_ids"]
    found = logits_of(opened(written(model)), inputs)
    np.testing.assert_allclose(found, torch_logits(model, inputs), rtol=0, atol=ROUNDING["roberta"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[9], [9, 30, 3, 3], [LONGEST, LONGEST]], ids=["one", "several", "full"])
def test_nothing_is_computed_for_padding(kind: str, lengths: list[int]) -> None:
    """Every layer but the last has a row per real token in its feed-forward, the last a row per pair."""
    graph = written(MODELS[kind])
    products = {node.name: node for node in graph.graph.node}
    read = [products[f"layer.{number}/intermediate/dense"].input[0] for number in range(2)]
    kept = [products[f"layer.{number}/attention/{part}"].output[0] for number, part in PROJECTIONS]
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in read + kept
    )
    inputs = random_inputs(MODELS[kind], lengths, columns=LONGEST)
    shapes = [value.shape for value in opened(graph).run(read + kept, inputs)]
    tokens, pairs, hidden = sum(lengths), len(lengths), SHAPE["hidden_size"]
    assert shapes[:2] == [(tokens, hidden), (pairs, hidden)]
    assert shapes[2:] == [(tokens, 3 * hidden), (pairs, hidden), (tokens, 2 * hidden)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_valid_and_names_its_products_by_layer(kind: str) -> None:
    graph = written(MODELS[kind])
    onnx.checker.check_model(graph, full_check=True)
    names = [node.name for node in graph.graph.node if node.op_type in ("MatMul", "Gemm")]
    others = ("attention/output/dense", "intermediate/dense", "output/dense")
    expected = [
        f"layer.{number}/{part}"
        for number in range(2)
        for part in (*(f"attention/{part}" for layer, part in PROJECTIONS if layer == number), *others)
    ]
    before = ["embeddings/project"] if kind == "electra" else []
    assert names == [*before, *expected, "head/dense", "logits"]
    assert len({node.name for node in graph.graph.node}) == len(graph.graph.node)
    types = [] if kind == "roberta" else ["token_type_ids"]
    assert [entry.name for entry in graph.graph.input] == ["input_ids", "attention_mask", *types]


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_stored_once(kind: str) -> None:
    graph, model = written(MODELS[kind]), MODELS[kind]
    stored = sum(int(np.prod(entry.dims)) for entry in graph.graph.initializer if entry.data_type == 1)
    assert stored == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["roberta", "bert", "xlm-roberta", "camembert"])
def test_an_encoder_of_absolute_positions_is_written_for_gpus(model_type: str) -> None:
    assert is_written_for_gpus({"model_type": model_type})
    assert is_written_for_gpus({"model_type": model_type, "hidden_act": "relu", "position_embedding_type": "absolute"})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "silu"},
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": "relative_key_query"},
        {"is_decoder": True},
        {"model_type": "electra"},
        {"model_type": "distilbert"},
        {"model_type": "albert"},
        {"model_type": "roberta-prelayernorm"},
        {"model_type": "xlm-roberta-xl"},
        {"model_type": "mpnet"},
        {"model_type": "data2vec-text"},
    ],
    ids=str,
)
def test_other_architectures_are_left_to_optimum(changes: dict[str, Any]) -> None:
    for model_type in ("roberta", "bert"):
        assert not is_written_for_gpus({"model_type": model_type, "hidden_act": "gelu", **changes})


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu_new"}, {"position_embedding_type": "relative_key"}, {"is_decoder": True}], ids=str
)
def test_an_electra_is_written_for_cpus_if_its_layers_are_known(changes: dict[str, Any]) -> None:
    assert family_of({"model_type": "electra", "hidden_act": "gelu"}) is not None
    assert family_of({"model_type": "electra", "hidden_act": "gelu", **changes}) is None
