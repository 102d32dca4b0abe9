"""Rewrite a float32 graph's products in 8 bits, node by node.

Knows the operators that ONNX Runtime runs fast; which products are rewritten, and how well, is decided in `int8.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import helper

from cappy_engine.errors import GraphError
from cappy_export.graphs.writer import MICROSOFT
from cappy_export.precisions.calibration import Activations
from cappy_export.precisions.rotation import Rotation, rotation_for
from cappy_export.precisions.rounding import Floats, Int8, compensate_weights, quantize_weights

GELUS = ("Gelu", "BiasGelu")
GELU_MINIMUM = 0.17
"""A bound of Gelu's smallest value, -0.16997."""


@dataclass(frozen=True)
class Int8Options:
    """Say how products are brought into 8 bits; the defaults are an export's.

    >>> Int8Options(rotates=True, compensates=True)  # accurate int8

    Products whose names hold one of `float32_products` stay as they are. `rotates`: see `rotation.py`. `compensates`
    rounds weights with `rounding.compensate_weights`, and `rounds` does where that lacks moments.
    """

    float32_products: Sequence[str] = ()
    rotates: bool = False
    compensates: bool = False
    rounds: Callable[[Floats], tuple[Int8, Floats]] = quantize_weights

    @property
    def needs_moments(self) -> bool:
        """Tell whether second moments of the activations are needed."""
        return self.rotates or self.compensates


@dataclass(frozen=True)
class _Range:
    """Say how an activation goes into 8 bits: `zero_point`, the `steps` above it, and the least maximum of a token."""

    zero_point: int
    steps: int
    least: float
    is_signed: bool


_SIGNED = _Range(zero_point=128, steps=127, least=1e-12, is_signed=True)
_AFTER_GELU = _Range(zero_point=16, steps=239, least=GELU_MINIMUM * 239 / 16, is_signed=False)
"""Gelu gives almost no negative values: 16 steps hold them, which leaves nearly twice the precision for the others."""


class Rewriter:
    """Replace products of a graph, one by one; an activation that several products read is quantised once.

    >>> rewriter = Rewriter(model, Int8Options(), {"layer.0/dense"}, {})
    >>> for node in list(model.graph.node):
    ...     rewriter.take(node)
    >>> rewriter.finish()
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        options: Int8Options,
        products: Collection[str],
        activations: Mapping[str, Activations],
    ) -> None:
        """Take the names of the `products` to replace, and the `activations` that they read."""
        self._products = products
        self._activations = activations
        self._nodes: list[onnx.NodeProto] = []
        self._model = model
        self._options = options
        self._weights = {entry.name: entry for entry in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constants: dict[str, onnx.TensorProto] = {}
        self._shifts: dict[str, Floats] = {}
        self._rotations: dict[str, Rotation] = {}
        self._quantized: dict[str, tuple[str, str, str]] = {}
        self._merged: set[str] = set()

    def take(self, node: onnx.NodeProto) -> None:
        """Take the graph's next node: replace it if it is one of the products, else keep it."""
        if node.name not in self._products:
            if node.name not in self._merged:
                self._nodes.append(node)
        elif node.op_type == "Attention":
            self._replace_attention(node)
        else:
            self._replace_product(node)

    def finish(self) -> None:
        """Put the new nodes and constants into the model; take out weights that nobody reads."""
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._constants.values())
        read = {name for node in _with_subgraphs(graph) for name in node.input}
        for entry in [entry for entry in graph.initializer if entry.name not in read]:
            graph.initializer.remove(entry)
        if all(entry.domain != MICROSOFT for entry in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def _replace_product(self, node: onnx.NodeProto) -> None:
        """Put the 8-bit product, with its bias, in place of a MatMul or a Gemm."""
        weights, is_transposed = self._weights_of(node)
        matrix = f"{node.input[1]}/transposed" if is_transposed else node.input[1]
        has_bias = len(node.input) > 2
        out = f"{node.name}/product" if has_bias else node.output[0]
        product = self._product(node.input[0], matrix, weights, out, node.name)
        if has_bias:
            self._add_bias(node, product, self._corrected_bias(node))

    def _weights_of(self, node: onnx.NodeProto) -> tuple[Floats, bool]:
        """Load a product's weights (inputs, outputs), and tell whether they are stored transposed."""
        weights = self._array(node.input[1])
        is_transposed = node.op_type == "Gemm" and self._is_transposed(node)
        return (weights.T if is_transposed else weights), is_transposed

    def _is_transposed(self, node: onnx.NodeProto) -> bool:
        """Tell whether a Gemm reads its weights as (outputs, inputs); raises GraphError where it does anything else."""
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        is_transposed = bool(attributes.pop("transB", 0))
        neutral = {"alpha": 1, "beta": 1, "transA": 0}
        if any(attributes.get(name, value) != value for name, value in neutral.items()):
            raise GraphError(f"{node.name} is a Gemm with {attributes}, which is not known to the quantisation")
        return is_transposed

    def _corrected_bias(self, node: onnx.NodeProto) -> str:
        """Add the bias, less the shift of the mean that rounded weights bring."""
        bias = str(node.input[2])
        if node.name not in self._shifts or bias not in self._weights:
            return bias
        return self._constant(f"{node.name}/corrected_bias", self._array(bias) - self._shifts[node.name])

    def _add_bias(self, node: onnx.NodeProto, product: str, bias: str) -> None:
        """Add the bias; where only a Gelu reads the sum, both at once."""
        readers = self._readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Gelu" and readers[0].domain == MICROSOFT:
            gelu = readers[0]
            self._merged.add(gelu.name)
            self._emit("BiasGelu", [product, bias], gelu.output[0], gelu.name, domain=MICROSOFT)
            return
        self._emit("Add", [product, bias], node.output[0], f"{node.name}/bias")

    def _replace_attention(self, node: onnx.NodeProto) -> None:
        """Write Attention as its three projections and MultiHeadAttention, which takes the same bias and masks."""
        thirds = np.split(self._array(node.input[1]), 3, axis=1)
        parts = [
            self._product(node.input[0], f"{node.input[1]}/{role}", third, f"{node.name}/{role}", f"{node.name}/{role}")
            for role, third in zip(("query", "key", "value"), thirds, strict=True)
        ]
        inputs = [*node.input, *[""] * 6]
        bias, mask, past, attention_bias = inputs[2:6]
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if past or len(node.output) > 1 or attributes.get("unidirectional", 0) or attributes.get("qkv_hidden_sizes"):
            raise GraphError(f"{node.name} is an Attention of a kind that is not known to the quantisation")
        known = {name: attributes[name] for name in ("num_heads", "scale", "mask_filter_value") if name in attributes}
        self._emit(
            "MultiHeadAttention",
            [*parts, bias, mask, attention_bias],
            node.output[0],
            node.name,
            domain=MICROSOFT,
            **known,
        )

    def _product(self, source: str, matrix: str, weights: Floats, out: str, name: str) -> str:
        """Multiply `source` by `weights`, which are known as `matrix`: layers that share it share its 8-bit form.

        With moments the 8-bit form depends on the source, too, and is shared by none.
        """
        rotation, known = self._rotation(source), self._activations.get(source)
        if self._options.needs_moments:
            matrix = f"{name}/weights"
        if rotation is not None and known is not None:
            weights, known = rotation.of_weights(weights), rotation.of_activations(known)
        if f"{matrix}/int8" not in self._constants:
            steps, scales = self._rounded(weights, known)
            self._constant(f"{matrix}/int8", steps)
            self._constant(f"{matrix}/scales", scales)
        if known is not None:
            steps, scales = (
                onnx.numpy_helper.to_array(self._constants[f"{matrix}/{part}"]) for part in ("int8", "scales")
            )
            self._shifts[name] = (known.mean @ (steps * scales - weights)).astype(np.float32)
        activation, scale, zero_point = self._in_8_bits(source)
        inputs = [
            activation,
            f"{matrix}/int8",
            self._constant("unit_scale", np.float32(1)),
            f"{matrix}/scales",
            zero_point,
        ]
        whole = self._emit("MatMulIntegerToFloat", inputs, f"{name}/sums", f"{name}/sums", domain=MICROSOFT)
        return self._emit("Mul", [whole, scale], out, name)

    def _rounded(self, weights: Floats, activations: Activations | None) -> tuple[Int8, Floats]:
        if self._options.compensates and activations is not None and activations.moments is not None:
            return compensate_weights(weights, activations.moments)
        return self._options.rounds(weights)

    def _rotation(self, source: str) -> Rotation | None:
        """Choose how `source` is rotated before it is quantised: once for all products that read it."""
        known = self._activations.get(source)
        if not self._options.rotates or known is None or known.moments is None:
            return None
        if source not in self._rotations:
            readers = [node for node in self._readers[source] if node.name in self._products]
            weights = [self._weights_of(node)[0] for node in readers]
            self._rotations[source] = rotation_for(known.moments, weights)
        return self._rotations[source]

    def _rotated(self, source: str, rotation: Rotation) -> str:
        """Write the nodes of `rotation`, for any dimensions before the last."""
        inverse = self._constant(f"{source}/inverse_factors", 1 / rotation.factors)
        scaled = self._emit("Mul", [source, inverse], f"{source}/divided", f"{source}/divided")
        block = len(rotation.matrix)
        shape = self._emit("Shape", [source], f"{source}/shape", f"{source}/shape")
        shape_of_blocks = self._constant(f"blocks_of_{block}", np.array([-1, block], np.int64))
        blocks = self._emit("Reshape", [scaled, shape_of_blocks], f"{source}/blocks", f"{source}/blocks")
        matrix = self._constant(f"hadamard_{block}", rotation.matrix)
        turned = self._emit("MatMul", [blocks, matrix], f"{source}/turned", f"{source}/turned")
        return self._emit("Reshape", [turned, shape], f"{source}/rotated", f"{source}/rotated")

    def _in_8_bits(self, source: str) -> tuple[str, str, str]:
        """Bring `source`, rotated if asked, into 8 bits; return it, its scale per token (..., 1), and zero point."""
        if source not in self._quantized:
            producer, rotation = self._producers.get(source), self._rotation(source)
            limits = _AFTER_GELU if producer is not None and producer.op_type in GELUS else _SIGNED
            self._quantized[source] = (
                self._steps(source, limits)
                if rotation is None
                else self._steps(self._rotated(source, rotation), _SIGNED)
            )
        return self._quantized[source]

    def _steps(self, source: str, limits: _Range) -> tuple[str, str, str]:
        sized = self._emit("Abs", [source], f"{source}/size", f"{source}/size") if limits.is_signed else source
        axis = self._constant("int8_axis", np.array([-1], np.int64))
        largest = self._emit("ReduceMax", [sized, axis], f"{source}/max", f"{source}/max", keepdims=1)
        least = self._constant(f"least_{limits.zero_point}", np.float32(limits.least))
        bounded = self._emit("Max", [largest, least], f"{source}/bounded", f"{source}/bounded")
        step = self._constant(f"step_{limits.zero_point}", np.float32(1 / limits.steps))
        scale = self._emit("Mul", [bounded, step], f"{source}/scale", f"{source}/scale")
        inverse = self._emit("Reciprocal", [scale], f"{source}/inverse", f"{source}/inverse")
        scaled = self._emit("Mul", [source, inverse], f"{source}/scaled", f"{source}/scaled")
        zero_point = self._constant(f"zero_point_{limits.zero_point}", np.uint8(limits.zero_point))
        unit = self._constant("unit_scale", np.float32(1))
        whole = self._emit("QuantizeLinear", [scaled, unit, zero_point], f"{source}/int8", f"{source}/int8")
        return whole, scale, zero_point

    def _emit(self, operator: str, inputs: Sequence[str], out: str, name: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [out], name, **attributes))
        return out

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            self._constants[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def _array(self, name: str) -> Floats:
        array: Floats = onnx.numpy_helper.to_array(self._weights[name])
        return array


def _with_subgraphs(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """List the graph's nodes, and those of all the branches and loop bodies in it."""
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _with_subgraphs(attribute.g)
    return found
