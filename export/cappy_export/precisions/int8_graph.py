"""Rewrite a float32 graph's products in 8 bits, node by node.

A product with a bias becomes one operator of `graphs/operators.py`, with the Gelu, the residual, or residual and layer
norm behind it. A layer norm or gate that only such products read is a part of their rounding. Which products are
rewritten, and how well, is decided in `int8.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from onnx import helper

from cappy_engine.native.operands import GROUP, PANEL, Rounding
from cappy_engine.native.reference import pack
from cappy_export.graphs.operators import DOMAIN
from cappy_export.graphs.writer import MICROSOFT
from cappy_export.precisions.calibration import Activations
from cappy_export.precisions.float_graph import epsilon_of, is_full_norm, multi_head
from cappy_export.precisions.product_rewriter import ProductRewriter
from cappy_export.precisions.rotation import Rotation, rotation_for
from cappy_export.precisions.rounding import Floats, Int8, compensate_weights

ROUNDING = Rounding()
"""How activations are rounded; products subtract its zero point."""


@dataclass(frozen=True)
class Int8Options:
    """Say how products are brought into 8 bits.

    Products whose names hold one of `float32_products` stay as they are. `rounds` rounds weights; it is given the
    second moments of their inputs, too.
    """

    float32_products: Sequence[str] = ()
    rounds: Callable[[Floats, Floats], tuple[Int8, Floats]] = compensate_weights


@dataclass(frozen=True)
class _Product:
    """Name the tensors of a product in 8 bits: the activation with its scales, and the weights with theirs."""

    activation: str
    scale: str
    weights: str
    weight_scales: str


class Int8Rewriter(ProductRewriter):
    """Write 8-bit products in place of a graph's; an activation that several products read is quantised once.

    >>> Int8Rewriter(model, Int8Options(), {"layer.0/dense"}, activations).rewrite()
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        options: Int8Options,
        products: Collection[str],
        activations: Mapping[str, Activations],
    ) -> None:
        """Take the names of the `products` to replace, and the `activations` that they read."""
        super().__init__(model, products)
        self._activations = activations
        self._options = options
        self._shifts: dict[str, Floats] = {}
        self._rotations: dict[str, Rotation] = {}
        self._quantized: dict[str, tuple[str, str]] = {}

    def _replace(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "Attention":
            self._replace_attention(node)
        else:
            self._replace_product(node)
        return True

    def _replace_product(self, node: onnx.NodeProto) -> None:
        """Put the 8-bit product in place of a MatMul or a Gemm.

        A Gemm is replaced together with the nodes behind it that fit into the same operator.
        """
        weights, _ = self._graph.weights_of(node)
        has_bias = len(node.input) > 2
        is_linear = has_bias and self._is_linear(node, weights)
        product = self._product(node.input[0], weights, node.name, is_packed=is_linear)
        if is_linear:
            inputs = [product.activation, product.scale, product.weights, product.weight_scales]
            self._join(node, [*inputs, self._corrected_bias(node)], zero_point=ROUNDING.zero_point)
        elif has_bias:
            whole = self._multiply(product, f"{node.name}/product", node.name, has_bias=True)
            self._emit("Add", [whole, self._corrected_bias(node)], node.output[0], f"{node.name}/bias")
        else:
            self._multiply(product, node.output[0], node.name)

    def _is_linear(self, node: onnx.NodeProto, weights: Floats) -> bool:
        """Tell whether a Gemm can be Linear: its weights fill whole panels, and its bias has a value per column."""
        inner, columns = weights.shape
        bias = self._graph.weights.get(node.input[2])
        return inner % GROUP == 0 and columns % PANEL == 0 and bias is not None and list(bias.dims) == [columns]

    def _corrected_bias(self, node: onnx.NodeProto) -> str:
        """Name the bias less the shift. The shift comes from the mean that was taken out of the inputs."""
        bias = str(node.input[2])
        if bias not in self._graph.weights:
            corrected = f"{node.name}/corrected_bias"
            return self._emit("Sub", [bias, self._shift(node.name)], corrected, corrected)
        return self._constant(f"{node.name}/corrected_bias", self._graph.array(bias) - self._shifts[node.name])

    def _replace_attention(self, node: onnx.NodeProto) -> None:
        """Write Attention as its three projections and MultiHeadAttention, which takes the same bias and masks."""
        thirds = np.split(self._graph.array(node.input[1]), 3, axis=1)
        parts = []
        for role, third in zip(("query", "key", "value"), thirds, strict=True):
            name = f"{node.name}/{role}"
            product = self._product(node.input[0], third, name)
            parts.append(self._multiply(product, name, name))
        self._nodes.append(multi_head(node, parts))

    def _product(self, source: str, weights: Floats, name: str, *, is_packed: bool = False) -> _Product:
        """Bring `source` and its product's `weights` into 8 bits.

        The weights are those of one rotated source: where several products read them, each has its own 8-bit form.
        """
        rotation = self._rotation(source)
        self._shifts[name] = -rotation.mean @ weights
        moments = rotation.of_moments(self._activations[source].moments)
        steps, scales = self._options.rounds(rotation.of_weights(weights), moments)
        matrix = f"{name}/weights"
        stored = (
            self._constant(f"{matrix}/packed", pack(steps)) if is_packed else self._constant(f"{matrix}/int8", steps)
        )
        return _Product(*self._in_8_bits(source), stored, self._constant(f"{matrix}/scales", scales))

    def _shift(self, name: str) -> str:
        return self._constant(f"{name}/shift", self._shifts[name])

    def _multiply(self, product: _Product, out: str, name: str, *, has_bias: bool = False) -> str:
        """Write a product without its bias, for activations of any number of dimensions.

        Where no bias follows, the mean that a rotation took out of the inputs is put back here.
        """
        inputs = [
            product.activation,
            product.weights,
            self._constant("unit_scale", np.float32(1)),
            product.weight_scales,
            self._constant("zero_point", np.uint8(ROUNDING.zero_point)),
        ]
        whole = self._emit("MatMulIntegerToFloat", inputs, f"{name}/sums", f"{name}/sums", domain=MICROSOFT)
        if has_bias:
            return self._emit("Mul", [whole, product.scale], out, name)
        centred = self._emit("Mul", [whole, product.scale], f"{name}/centred", f"{name}/centred")
        return self._emit("Sub", [centred, self._shift(name)], out, name)

    def _rotation(self, source: str) -> Rotation:
        """Choose how `source` is rotated before it is quantised: once for all products that read it."""
        if source not in self._rotations:
            readers = [node for node in self._graph.readers[source] if node.name in self._products]
            weights = [self._graph.weights_of(node)[0] for node in readers]
            self._rotations[source] = rotation_for(self._activations[source], weights)
        return self._rotations[source]

    def _in_8_bits(self, source: str) -> tuple[str, str]:
        """Bring `source`, rotated, into 8 bits; return it and its scale per token, (..., 1)."""
        if source not in self._quantized:
            self._quantized[source] = self._rows_in_8_bits(source, self._rotation(source))
        return self._quantized[source]

    def _joined_before(self, source: str) -> onnx.NodeProto | None:
        """Find the layer norm or gate that makes `source`, and take it out.

        None if anything but products in 8 bits reads `source`.
        """
        producer: onnx.NodeProto | None = self._graph.producers.get(source)
        readers = self._graph.readers[source]
        is_read = self._graph.is_output(source) or not all(node.name in self._products for node in readers)
        if producer is None or is_read:
            return None
        if not (is_full_norm(producer) or (producer.op_type, producer.domain) == ("GeGlu", DOMAIN)):
            return None
        alone = [place for place, node in enumerate(self._nodes) if node.name == producer.name]
        if not alone:  # it is a part of another operator
            return None
        del self._nodes[alone[0]]
        return producer

    def _rows_in_8_bits(self, source: str, rotation: Rotation) -> tuple[str, str]:
        whole, scale, inputs = f"{source}/int8", f"{source}/scale", [source]
        operator, attributes = "QuantizeRotatedRows", {**asdict(ROUNDING), "block": rotation.block}
        before = self._joined_before(source)
        if before is not None and before.op_type == "GeGlu":
            operator, inputs = "QuantizeGatedRows", [*before.input]
        elif before is not None:
            operator, inputs, attributes["epsilon"] = "QuantizeNormedRows", [*before.input], epsilon_of(before)
        inputs.append(self._constant(f"{source}/factors", rotation.inverse_factors))
        inputs.append(self._constant(f"{source}/offsets", rotation.offsets))
        self._nodes.append(helper.make_node(operator, inputs, [whole, scale], whole, domain=DOMAIN, **attributes))
        return whole, scale
