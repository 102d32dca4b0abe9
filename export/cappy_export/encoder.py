"""A BERT or RoBERTa encoder as a graph, written operator by operator: nothing is computed for padding.

`input_ids` and `attention_mask` come padded, (batch, length), as every tool gives them. The first thing the graph does
is to take the real tokens out, one after the other: (tokens, hidden). Embeddings, projections, feed-forward layers and
layer norms run on those; attention runs pair by pair, at the pair's own length and without a mask (`Loop`; with one
pair, directly). So a pair alone and in any company goes through the same operations on the same numbers. In the last
layer only the first token of a pair is read, so queries, attention output and feed-forward are computed for that token
alone, which is exact.

Residuals are Add and LayerNormalization: ONNX Runtime 1.32's SkipLayerNormalization takes 5 to 6 times as long as the
three operators that it replaces (not vectorised; `python -m benchmarks.operators`).

Knows the layout of the weights in transformers' models; knows nothing of quantisation or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
IR_VERSION = 8
MICROSOFT = "com.microsoft"
ACTIVATIONS = {"gelu": ("Gelu", MICROSOFT), "relu": ("Relu", "")}
COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Their position ids begin after the padding's id, and a token that is padding's has none."""
HEADS = {
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "camembert": ("classifier.dense", "classifier.out_proj"),
    "bert": ("bert.pooler.dense", "classifier"),
}
"""By model type: the names of the head's two linear layers, a tanh between them."""
PREFIXES = {"roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta", "bert": "bert"}

Weights = Mapping[str, npt.NDArray[np.float32]]


def is_written_directly(config: Mapping[str, Any]) -> bool:
    """Whether `write_encoder` knows this architecture: its layers, its activation, and absolute positions."""
    return (
        config["model_type"] in HEADS
        and config.get("hidden_act", "gelu") in ACTIVATIONS
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder")
    )


def encoder_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """The model with the transformers `config` and `weights` (by their names in PyTorch; computed in float32).

    Inputs `input_ids`, `attention_mask` and, for BERT, `token_type_ids`, (batch, length) int64, each row with one token
    or more that is not masked; output `logits`, (batch, 1) float32.
    """
    graph = _Graph()
    encoder = _Encoder(graph, config, {name: np.asarray(value, np.float32) for name, value in weights.items()})
    tokens = encoder.tokens()
    hidden = encoder.embed(tokens)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(layer, hidden, tokens, is_last=layer == config.num_hidden_layers - 1)
    encoder.head(hidden)
    return graph.model(config.model_type, encoder.inputs)


class _Graph:
    """Nodes and constants of one graph (or of a branch of it, whose constants are its parent's)."""

    def __init__(self, parent: _Graph | None = None, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {} if parent is None else parent.constants
        self._prefix = prefix

    def add(self, operator: str, inputs: Sequence[str], name: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its output, which is the node's."""
        name = self._prefix + name
        self.nodes.append(helper.make_node(operator, inputs, [name], name, domain=domain, **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        """The name of an initializer with `value`; integers are int64."""
        if name not in self.constants:
            array = np.array(value, order="C")
            if array.dtype == np.float64:
                array = array.astype(np.float32)
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def model(self, name: str, inputs: Sequence[str]) -> onnx.ModelProto:
        """The finished model."""
        axes = ["batch_size", "sequence_length"]
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(entry, TensorProto.INT64, axes) for entry in inputs],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [axes[0], 1])],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cappy-export")


@dataclass(frozen=True)
class _Tokens:
    """Names of what is known of the real tokens: their places (tokens, 2), each pair's begin and end (batch,)."""

    places: str
    starts: str
    ends: str
    count: str
    is_single: str


class _Encoder:
    def __init__(self, graph: _Graph, config: Any, weights: Weights) -> None:
        self._graph = graph
        self._config = config
        self._weights = weights
        self._prefix = PREFIXES[config.model_type]
        self._counts_from_padding = config.model_type in COUNTS_FROM_PADDING
        self.inputs = ["input_ids", "attention_mask", *([] if self._counts_from_padding else ["token_type_ids"])]

    def tokens(self) -> _Tokens:
        graph, constant = self._graph, self._graph.constant
        places = graph.add("Transpose", [graph.add("NonZero", ["attention_mask"], "kept")], "places", perm=[1, 0])
        lengths = graph.add("ReduceSum", ["attention_mask", constant("last_axis", [-1])], "lengths", keepdims=0)
        ends = graph.add("CumSum", [lengths, constant("zero", 0)], "ends")
        shape = graph.add("Shape", ["attention_mask"], "batch_shape")
        count = graph.add("Gather", [shape, constant("zero", 0)], "pair_count")
        return _Tokens(
            places=places,
            starts=graph.add("Sub", [ends, lengths], "starts"),
            ends=ends,
            count=count,
            is_single=graph.add("Equal", [count, constant("one", 1)], "is_single"),
        )

    def embed(self, tokens: _Tokens) -> str:
        """Embeddings of the real tokens: (tokens, hidden)."""
        graph, prefix = self._graph, f"{self._prefix}.embeddings"
        words = self._rows(f"{prefix}.word_embeddings", self._kept("input_ids", tokens))
        positions = self._rows(f"{prefix}.position_embeddings", self._kept(self._positions(), tokens))
        kinds = f"{prefix}.token_type_embeddings"
        if self._counts_from_padding:  # one type only: the row is a constant
            types = graph.constant(f"{kinds}.row", self._weights[f"{kinds}.weight"][0])
        else:
            types = self._rows(kinds, self._kept("token_type_ids", tokens))
        total = graph.add("Add", [graph.add("Add", [words, types], "words_and_types"), positions], "embeddings")
        return self._norm(f"{prefix}.LayerNorm", total)

    def layer(self, number: int, hidden: str, tokens: _Tokens, *, is_last: bool) -> str:
        """One layer: (tokens, hidden) to the same; to (batch, hidden), the first tokens only, where it is the last."""
        graph, prefix = self._graph, f"{self._prefix}.encoder.layer.{number}"
        attended, name = f"{prefix}.attention", f"layer.{number}"
        read = graph.add("Gather", [hidden, tokens.starts], f"{name}/first_tokens") if is_last else hidden
        query, key, value = (
            graph.add("MatMul", [source, self._matrix(f"{attended}.self.{part}")], f"{name}/attention/{part}")
            for part, source in (("query", read), ("key", hidden), ("value", hidden))
        )
        biases = [self._weights[f"{attended}.self.{part}.bias"] for part in ("query", "key", "value")]
        bias = graph.constant(f"{attended}.self.bias", np.concatenate(biases))
        context = self._attention(f"{name}/attention", [query, key, value, bias], tokens, is_last=is_last)
        output = self._linear(f"{attended}.output.dense", context, f"{name}/attention/output/dense")
        mixed = graph.add("Add", [output, read], f"{name}/attention/residual")
        middle = self._norm(f"{attended}.output.LayerNorm", mixed)
        wide = self._linear(f"{prefix}.intermediate.dense", middle, f"{name}/intermediate/dense")
        activation, domain = ACTIVATIONS[self._config.hidden_act]
        active = graph.add(activation, [wide], f"{name}/intermediate/activation", domain=domain)
        narrow = self._linear(f"{prefix}.output.dense", active, f"{name}/output/dense")
        return self._norm(f"{prefix}.output.LayerNorm", graph.add("Add", [narrow, middle], f"{name}/output/residual"))

    def head(self, first: str) -> None:
        """Logits (batch, 1) of the first tokens (batch, hidden)."""
        dense, out = HEADS[self._config.model_type]
        active = self._graph.add("Tanh", [self._linear(dense, first, "head/dense")], "head/activation")
        self._linear(out, active, "logits")

    def _attention(self, name: str, inputs: Sequence[str], tokens: _Tokens, *, is_last: bool) -> str:
        """Attention within each pair: (tokens, hidden); in the last layer of the first tokens (batch, hidden)."""
        outputs = [helper.make_tensor_value_info(f"{name}/single", TensorProto.FLOAT, None)]
        alone = _Graph(self._graph, f"{name}/single/")
        alone.nodes.append(helper.make_node("Identity", [self._attend(alone, inputs)], [f"{name}/single"]))
        many = _Graph(self._graph, f"{name}/many/")
        sequence = many.add("SequenceEmpty", [], "none", dtype=TensorProto.FLOAT)
        body = self._each_pair(f"{name}/pair", inputs, tokens, is_last=is_last)
        attended = many.add("Loop", [tokens.count, "", sequence], "pairs", body=body)
        many.nodes.append(helper.make_node("ConcatFromSequence", [attended], [f"{name}/many"], axis=0))
        return self._graph.add(
            "If",
            [tokens.is_single],
            name,
            then_branch=helper.make_graph(alone.nodes, f"{name}/single", [], outputs),
            else_branch=helper.make_graph(
                many.nodes, f"{name}/many", [], [helper.make_tensor_value_info(f"{name}/many", TensorProto.FLOAT, None)]
            ),
        )

    def _each_pair(self, name: str, inputs: Sequence[str], tokens: _Tokens, *, is_last: bool) -> onnx.GraphProto:
        """The body of the loop: cut one pair's rows out, attend, and put the result at the end of the sequence."""
        body, (query, key, value, bias) = _Graph(self._graph, f"{name}/"), inputs
        one = body.constant("one_element", [1])
        number = f"{name}/number"
        start = body.add("Reshape", [body.add("Gather", [tokens.starts, number], "start"), one], "begin")
        end = body.add("Reshape", [body.add("Gather", [tokens.ends, number], "end"), one], "stop")
        first = body.constant("first_axis", [0])
        rows = [body.add("Slice", [part, start, end, first], role) for part, role in ((key, "key"), (value, "value"))]
        if is_last:
            asked = body.add("Gather", [query, body.add("Reshape", [number, one], "row")], "query")
        else:
            asked = body.add("Slice", [query, start, end, first], "query")
        context = self._attend(body, [asked, *rows, bias])
        body.nodes.append(helper.make_node("SequenceInsert", [f"{name}/before", context], [f"{name}/after"]))
        body.nodes.append(helper.make_node("Identity", [f"{name}/goes_on"], [f"{name}/goes_on_still"]))
        return helper.make_graph(
            body.nodes,
            name,
            [
                helper.make_tensor_value_info(number, TensorProto.INT64, []),
                helper.make_tensor_value_info(f"{name}/goes_on", TensorProto.BOOL, []),
                helper.make_tensor_sequence_value_info(f"{name}/before", TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info(f"{name}/goes_on_still", TensorProto.BOOL, []),
                helper.make_tensor_sequence_value_info(f"{name}/after", TensorProto.FLOAT, None),
            ],
        )

    def _attend(self, graph: _Graph, inputs: Sequence[str]) -> str:
        """Attention of one pair, (length, hidden) each, at its exact length: no mask."""
        first = graph.constant("first_axis", [0])
        lifted = [
            graph.add("Unsqueeze", [part, first], f"lifted_{role}")
            for part, role in zip(inputs[:3], ("query", "key", "value"), strict=True)
        ]
        context = graph.add(
            "MultiHeadAttention",
            [*lifted, inputs[3]],
            "context",
            domain=MICROSOFT,
            num_heads=self._config.num_attention_heads,
        )
        return graph.add("Squeeze", [context, first], "lowered")

    def _positions(self) -> str:
        """Position ids (batch, length), as transformers counts them; (1, length) where only the place counts."""
        graph, constant = self._graph, self._graph.constant
        if self._counts_from_padding:
            padding = constant("padding", self._config.pad_token_id)
            is_text = graph.add("Not", [graph.add("Equal", ["input_ids", padding], "is_padding")], "is_text")
            counted = graph.add("Cast", [is_text], "counted", to=TensorProto.INT64)
            running = graph.add("CumSum", [counted, constant("one", 1)], "running")
            return graph.add("Add", [graph.add("Mul", [running, counted], "numbered"), padding], "positions")
        every = graph.add("ConstantOfShape", [graph.add("Shape", ["input_ids"], "shape")], "every", value=_ONE)
        running = graph.add("CumSum", [every, constant("one", 1)], "running")
        return graph.add("Sub", [running, constant("one", 1)], "positions")

    def _kept(self, source: str, tokens: _Tokens) -> str:
        return self._graph.add("GatherND", [source, tokens.places], f"{source}/kept")

    def _rows(self, name: str, ids: str) -> str:
        return self._graph.add(
            "Gather", [self._graph.constant(f"{name}.weight", self._weights[f"{name}.weight"]), ids], name
        )

    def _matrix(self, name: str) -> str:
        return self._graph.constant(f"{name}.matrix", self._weights[f"{name}.weight"].T)

    def _linear(self, weights: str, hidden: str, name: str) -> str:
        bias = self._graph.constant(f"{weights}.bias", self._weights[f"{weights}.bias"])
        return self._graph.add("Gemm", [hidden, self._matrix(weights), bias], name)

    def _norm(self, weights: str, hidden: str) -> str:
        scale, bias = (self._graph.constant(f"{weights}.{part}", self._weights[f"{weights}.{part}"]) for part in _PARTS)
        epsilon = float(self._config.layer_norm_eps)
        return self._graph.add("LayerNormalization", [hidden, scale, bias], weights, axis=-1, epsilon=epsilon)


_PARTS = ("weight", "bias")
_ONE = helper.make_tensor("one", TensorProto.INT64, [1], [1])
