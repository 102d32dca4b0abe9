"""Write a graph operator by operator: nodes, constants, and what finds the real tokens. Knows no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cappy_export.graphs.operators import with_functions

OPSET = 18
IR_VERSION = 8
MICROSOFT = "com.microsoft"
ACTIVATIONS = {"gelu": ("Gelu", MICROSOFT), "relu": ("Relu", "")}
ROBERTAS = ("roberta", "xlm-roberta", "camembert")
"""Model types with RoBERTa's weights. `config.COUNTS_FROM_PADDING` has more: they count positions as it does."""

Weights = Mapping[str, npt.NDArray[np.float32]]


def is_written_for_gpus(config: Mapping[str, Any]) -> bool:
    """Tell whether an architecture's graphs are written here for CUDA and TensorRT too.

    >>> is_written_for_gpus({"model_type": "electra", "hidden_act": "gelu"})
    False
    """
    return config["model_type"] in (*ROBERTAS, "bert") and has_known_layers(config)


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

    def activation(self, kind: str, hidden: str, name: str) -> str:
        """Add an activation by its name in transformers."""
        operator, domain = ACTIVATIONS[kind]
        return self.add(operator, [hidden], name, domain=domain)

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
