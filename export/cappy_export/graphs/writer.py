"""Write an encoder's graph operator by operator: nodes, constants, and the pieces that all of its graphs share.

Knows the layout of the weights in transformers' models; knows nothing of attention, quantisation or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cappy_export.checkpoints.config import COUNTS_FROM_PADDING
from cappy_export.graphs.operators import with_functions

OPSET = 18
IR_VERSION = 8
MICROSOFT = "com.microsoft"
ACTIVATIONS = {"gelu": ("Gelu", MICROSOFT), "relu": ("Relu", "")}
TANH, GELU = ("Tanh", ""), ACTIVATIONS["gelu"]
HEADS = {
    "roberta": ("classifier.dense", TANH, "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", TANH, "classifier.out_proj"),
    "camembert": ("classifier.dense", TANH, "classifier.out_proj"),
    "bert": ("bert.pooler.dense", TANH, "classifier"),
    "electra": ("classifier.dense", GELU, "classifier.out_proj"),
}
"""The names of the head's two linear layers, by model type, and the activation between them."""
PREFIXES = {
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "roberta"),
    "bert": "bert",
    "electra": "electra",
}
FOR_ALL_DEVICES = ("roberta", "xlm-roberta", "camembert", "bert")

Weights = Mapping[str, npt.NDArray[np.float32]]


def is_written_directly(config: Mapping[str, Any]) -> bool:
    """Tell whether an architecture's graphs are written here for CPUs and GPUs.

    >>> is_written_directly({"model_type": "roberta", "hidden_act": "gelu"})
    True
    """
    return config["model_type"] in FOR_ALL_DEVICES and has_known_layers(config)


def has_known_layers(config: Mapping[str, Any]) -> bool:
    """Tell whether layers as BERT's are of a kind that is written here: by activation and absolute positions.

    >>> has_known_layers({"hidden_act": "silu"})
    False
    """
    return (
        config.get("hidden_act", "gelu") in ACTIVATIONS
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder")
    )


class GraphWriter:
    """Collect the nodes and constants of one graph.

    >>> graph = GraphWriter()
    >>> graph.add("Add", ["x", graph.constant("one", 1.0)], "sum")
    'sum'
    """

    def __init__(self, *, opset: int = OPSET) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._opset = opset

    def add(self, operator: str, inputs: Sequence[str], name: str, *, domain: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of its output, which is also the node's."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name, domain=domain, **attributes))
        return name

    def add_all(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], name: str, *, domain: str, **attributes: Any
    ) -> None:
        """Add a node with several outputs, by their names."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name, domain=domain, **attributes))

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer with `value`, unless `name` has one, and return `name`; integers are int64."""
        if name not in self.constants:
            array = np.array(value, order="C")
            if array.dtype == np.float64:
                array = array.astype(np.float32)
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def model(self, name: str, inputs: Sequence[str]) -> onnx.ModelProto:
        """Put all together: a model that takes `inputs` and gives `logits`."""
        axes = ["batch_size", "sequence_length"]
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(entry, TensorProto.INT64, axes) for entry in inputs],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [axes[0], 1])],
        )
        opsets = [helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cappy-export")
        for constant in self.constants.values():  # one by one: protobuf copies no message of more than 2 GiB
            model.graph.initializer.add().CopyFrom(constant)
        return with_functions(model)


class Parts:
    """Put an encoder's weights into a graph, and write the operators of its pieces.

    >>> parts = Parts(GraphWriter(), model.config, {name: value.numpy() for name, value in model.state_dict().items()})
    >>> parts.inputs
    ['input_ids', 'attention_mask', 'position_ids']
    """

    def __init__(self, graph: GraphWriter, config: Any, weights: Weights) -> None:
        """`weights` are by their names in PyTorch; `config` is transformers'."""
        self._graph = graph
        self._weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
        self.config = config
        self.prefix = PREFIXES[config.model_type]
        self.counts_from_padding = config.model_type in COUNTS_FROM_PADDING
        others = ["position_ids"] if self.counts_from_padding else ["token_type_ids"]
        self.inputs = ["input_ids", "attention_mask", *others]

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """Look up a weight by its name in PyTorch."""
        return self._weights[name]

    def types(self) -> str | None:
        """Add the row of the only token type; None where there are several, to look up by `rows`."""
        if not self.counts_from_padding:
            return None
        name = f"{self.prefix}.embeddings.token_type_embeddings"
        return self._graph.constant(f"{name}.row", self._weights[f"{name}.weight"][0])

    def rows(self, table: str, ids: str) -> str:
        """Look up the rows `ids` of the embeddings `table` ("word_embeddings")."""
        name = f"{self.prefix}.embeddings.{table}"
        return self._graph.add(
            "Gather", [self._graph.constant(f"{name}.weight", self._weights[f"{name}.weight"]), ids], name
        )

    def padded_embeddings(self) -> str:
        """Sum words, types and positions, padding included: (batch, length, hidden).

        `position_ids` is an input where they depend on the tokens: GPUs are slow to count, and TensorRT cannot.
        """
        graph, words = self._graph, self.rows("word_embeddings", "input_ids")
        types = self.types() or self.rows("token_type_embeddings", "token_type_ids")
        if self.counts_from_padding:
            positions = self.rows("position_embeddings", "position_ids")
        else:
            # Counted in float: TensorRT counts nothing else, and it sees the shape in this, but not in a Slice.
            # Counted from the mask: ids may be too large for fp16.
            mask = graph.add("Cast", ["attention_mask"], "mask_as_float", to=TensorProto.FLOAT)
            zeros = graph.add("Mul", [mask, graph.constant("zero_float", 0.0)], "zeros")
            ones = graph.add("Add", [zeros, graph.constant("one_float", 1.0)], "ones")
            running = graph.add("CumSum", [ones, graph.constant("axis_1", 1)], "running")
            places = graph.add("Sub", [running, graph.constant("one_float", 1.0)], "places_float")
            positions = self.rows("position_embeddings", graph.add("Cast", [places], "places", to=TensorProto.INT64))
        return graph.add("Add", [graph.add("Add", [words, types], "words_and_types"), positions], "embeddings")

    def matrix(self, name: str) -> str:
        """Add the weights of a linear layer, (inputs, outputs)."""
        return self._graph.constant(f"{name}.matrix", self._weights[f"{name}.weight"].T)

    def bias(self, name: str) -> str:
        """Add the bias of a linear layer, (outputs,)."""
        return self._graph.constant(f"{name}.bias", self._weights[f"{name}.bias"])

    def linear(self, weights: str, hidden: str, name: str) -> str:
        """Add a linear layer on (rows, inputs)."""
        return self._graph.add("Gemm", [hidden, self.matrix(weights), self.bias(weights)], name)

    def norm(self, weights: str, hidden: str, *, move: npt.NDArray[np.float64] | float = 0.0) -> str:
        """Add a layer normalisation over the last axis."""
        names = self.norm_weights(weights, move=move)
        return self._graph.add("LayerNormalization", [hidden, *names], weights, axis=-1, epsilon=self.epsilon)

    def norm_weights(self, name: str, *, move: npt.NDArray[np.float64] | float = 0.0) -> list[str]:
        """Add scale and shift of a layer normalisation, the shift with `move`, and return their names."""
        scale, shift = (self._weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return [self._graph.constant(f"{name}.weight", scale), self._graph.constant(f"{name}.bias", shift + move)]

    @property
    def epsilon(self) -> float:
        """Give the epsilon of all layer normalisations."""
        return float(self.config.layer_norm_eps)

    def head(self, first: str) -> None:
        """Add the head: logits (batch, 1) of the first tokens (batch, hidden)."""
        dense, (activation, domain), out = HEADS[self.config.model_type]
        wide = self.linear(dense, first, "head/dense")
        active = self._graph.add(activation, [wide], "head/activation", domain=domain)
        self.linear(out, active, "logits")


@dataclass(frozen=True)
class Tokens:
    """Name the tensors that tell of real tokens: their places (tokens, 2), each pair's length and start (batch,)."""

    places: str
    lengths: str
    starts: str


def find_tokens(graph: GraphWriter) -> Tokens:
    """Write what finds the real tokens in `attention_mask`.

    >>> find_tokens(GraphWriter()).lengths
    'lengths'
    """
    constant = graph.constant
    places = graph.add("Transpose", [graph.add("NonZero", ["attention_mask"], "kept")], "places", perm=[1, 0])
    lengths = graph.add("ReduceSum", ["attention_mask", constant("last_axis", [-1])], "lengths", keepdims=0)
    ends = graph.add("CumSum", [lengths, constant("zero", 0)], "ends")
    return Tokens(places=places, lengths=lengths, starts=graph.add("Sub", [ends, lengths], "starts"))


def kept(graph: GraphWriter, source: str, tokens: Tokens) -> str:
    """Write what takes the real tokens out of `source`, (batch, length): (tokens,).

    >>> kept(graph, "input_ids", tokens)
    'input_ids/kept'
    """
    return graph.add("GatherND", [source, tokens.places], f"{source}/kept")
