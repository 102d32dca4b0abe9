"""Look into a float32 graph: its weights, who makes and who reads a tensor, and what Gemms and layer norms say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx.numpy_helper
from onnx import helper

from cappy_engine.errors import GraphError
from cappy_export.graphs.writer import MICROSOFT
from cappy_export.precisions.rounding import Floats


class FloatGraph:
    """Know the nodes and weights of a model's graph, as it is now.

    >>> FloatGraph(onnx.load("my-bundle/onnx/model.onnx")).only_reader(node)
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.weights = {entry.name: entry for entry in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._outputs = {entry.name for entry in model.graph.output}

    def array(self, name: str) -> Floats:
        """Load a weight."""
        array: Floats = onnx.numpy_helper.to_array(self.weights[name])
        return array

    def weights_of(self, node: onnx.NodeProto) -> tuple[Floats, bool]:
        """Load a product's weights (inputs, outputs), and tell whether they are stored transposed."""
        weights = self.array(node.input[1])
        transposed = node.op_type == "Gemm" and is_transposed(node)
        return (weights.T if transposed else weights), transposed

    def is_output(self, name: str) -> bool:
        """Tell whether a tensor is an output of the graph."""
        return name in self._outputs

    def only_reader(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Find the one node that reads `node`, once; None if there are several, or it is an output of the graph."""
        readers = self.readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and not self.is_output(node.output[0]) else None


@dataclass(frozen=True)
class Joined:
    """What a product with a bias takes in: the `operator` of the whole, and the nodes `taken` into it, in order.

    `inputs` are the residual and, of a layer norm, its scale and its shift. `output` is that of the whole.
    """

    operator: str
    output: str
    taken: tuple[onnx.NodeProto, ...] = ()
    inputs: tuple[str, ...] = ()
    epsilon: float | None = None


def joined_with(graph: FloatGraph, product: onnx.NodeProto) -> Joined:
    """Find what alone reads a Gemm's sum, and can be a part of it: Gelu, a residual, or residual and layer norm.

    >>> joined_with(FloatGraph(model), gemm).operator
    'LinearGelu'
    """
    reader = graph.only_reader(product)
    if reader is not None and (reader.op_type, reader.domain) == ("Gelu", MICROSOFT):
        return Joined("LinearGelu", reader.output[0], (reader,))
    residuals = [] if reader is None or reader.op_type != "Add" else [*reader.input]
    residuals = [name for name in residuals if name != product.output[0] and name not in graph.weights]
    if reader is None or not residuals:
        return Joined("Linear", product.output[0])
    norm = graph.only_reader(reader)
    if norm is None or not is_full_norm(norm):
        return Joined("LinearAdd", reader.output[0], (reader,), (residuals[0],))
    return Joined("LinearNorm", norm.output[0], (reader, norm), (residuals[0], *norm.input[1:3]), epsilon_of(norm))


def is_transposed(gemm: onnx.NodeProto) -> bool:
    """Tell whether a Gemm reads its weights as (outputs, inputs); raises GraphError where it does anything else.

    >>> is_transposed(helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1))
    True
    """
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in gemm.attribute}
    transposed = bool(attributes.pop("transB", 0))
    neutral = {"alpha": 1, "beta": 1, "transA": 0}
    if any(attributes.get(name, value) != value for name, value in neutral.items()):
        raise GraphError(f"{gemm.name} is a Gemm with {attributes}, which is not known to the quantisation")
    return transposed


def is_full_norm(node: onnx.NodeProto) -> bool:
    """Tell whether a node normalises the last axis, with a scale and a shift.

    >>> is_full_norm(helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["y"]))
    True
    """
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1)
    return node.op_type == "LayerNormalization" and len(node.input) == 3 and len(node.output) == 1 and axis == -1


def epsilon_of(norm: onnx.NodeProto) -> float:
    """Read a layer norm's epsilon; ONNX's default is 1e-5.

    >>> epsilon_of(helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["y"]))
    1e-05
    """
    return next((float(entry.f) for entry in norm.attribute if entry.name == "epsilon"), 1e-5)


def multi_head(attention: onnx.NodeProto, parts: Sequence[str]) -> onnx.NodeProto:
    """Write MultiHeadAttention of three projections, `parts`, in place of Attention: with the same bias and masks.

    >>> multi_head(node, ["query", "key", "value"]).op_type
    'MultiHeadAttention'

    Raises GraphError for an Attention that does more.
    """
    inputs = [*attention.input, *[""] * 6]
    bias, mask, past, attention_bias = inputs[2:6]
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in attention.attribute}
    does_more = past or len(attention.output) > 1
    if does_more or attributes.get("unidirectional", 0) or attributes.get("qkv_hidden_sizes"):
        raise GraphError(f"{attention.name} is an Attention of a kind that is not known to the quantisation")
    known = {name: attributes[name] for name in ("num_heads", "scale", "mask_filter_value") if name in attributes}
    inputs = [*parts, bias, mask, attention_bias]
    name = "MultiHeadAttention"
    return helper.make_node(name, inputs, [attention.output[0]], attention.name, domain=MICROSOFT, **known)


def put_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], added: Iterable[onnx.TensorProto]) -> None:
    """Replace a model's nodes by `nodes`, and add the weights `added`.

    >>> put_nodes(model, model.graph.node, [])

    All weights that no node reads are removed.
    """
    graph, kept = model.graph, list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(added)
    read = {name for node in with_subgraphs(graph) for name in node.input}
    for entry in [entry for entry in graph.initializer if entry.name not in read]:
        graph.initializer.remove(entry)


def with_subgraphs(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """List the graph's nodes, and those of all the branches and loop bodies in it.

    >>> len(with_subgraphs(model.graph))
    """
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += with_subgraphs(attribute.g)
    return found
