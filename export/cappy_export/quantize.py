"""INT8: 8-bit products in place of a float32 graph's, so that a pair's score depends on nothing but the pair.

Weights are signed 8 bits with a scale per output channel. Activations are unsigned 8 bits with a scale *per token*,
taken when it runs: `quantize_dynamic` of ONNX Runtime, and so every tool built on it, takes one scale over the whole
batch, so that a pair's score changes with its neighbours. Word embeddings are 8 bits with a scale per row. Attention's
own products, layer norms and the head stay in float32.

**No CPU saturates.** Without VNNI, x86's u8s8 kernels add pairs of neighbouring products in 16 bits: 255 times two
weights of one sign must stay below 2**15. The usual remedy is 7-bit weights; here a channel's scale is chosen such that
no two neighbours of one sign sum to more than 128 steps, which takes less of the precision (README has figures). So the
sums are exact in 32 bits everywhere, and int8's scores do not depend on the CPU's integer kernels.

`python -m benchmarks.int8_options` measures the alternatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from cappy_engine.errors import GraphError
from cappy_export.graph import check_graph, head_nodes, save
from cappy_export.graph_writer import MICROSOFT
from cappy_export.half import Inputs, present_inputs, session_for

Int8 = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]
Means = Mapping[str, Floats]

QUANTIZED = ("MatMul", "Gemm", "Attention")
MIN_TABLE_ROWS = 1024
"""Tables of words have more rows than this, those of positions and token types fewer."""
MAX_WEIGHT = 127
MAX_NEIGHBOURS = 128
"""255 * 128 is the largest sum of two products that 16 bits hold."""
GELUS = ("Gelu", "BiasGelu")
GELU_MINIMUM = 0.17
"""Gelu's smallest value is -0.16997."""


@dataclass(frozen=True)
class Options:
    """What may be chosen, for `benchmarks.int8_options`; the defaults are what an export uses."""

    weight_bits: int = 8
    avoids_saturation: bool = True
    float32_products: Sequence[str] = ()


@dataclass(frozen=True)
class _Range:
    """How an activation goes into 8 bits: `zero_point`, the `steps` above it, and the least maximum of a token."""

    zero_point: int
    steps: int
    least: float
    is_signed: bool


SIGNED = _Range(zero_point=128, steps=127, least=1e-12, is_signed=True)
AFTER_GELU = _Range(zero_point=16, steps=239, least=GELU_MINIMUM * 239 / 16, is_signed=False)
"""Gelu gives almost no negative values: 16 steps hold them, which leaves nearly twice the precision for the others."""


def quantize(
    source: Path, out: Path, calibration: Iterable[Inputs] = (), *, float32_products: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the int8 model of the float32 model `source`; returns what is known of it, for the manifest.

    Rounded weights shift a product's mean. On the mean activations of `calibration` (model inputs by name) that shift
    is known, and is taken out of the bias of every Gemm (bias correction, arXiv 1906.04721, section 4.2); biases that
    are added elsewhere, as those of query, key and value, stay as they are.

    Products whose names hold one of `float32_products` stay in float32. Raises GraphError if one of these fits no
    product, and unless every other product with weights but those of the head was quantised.
    """
    means = mean_inputs(source, calibration)
    kept, counts = quantize_products(source, out, Options(float32_products=float32_products), means)
    left = [name for name in products_with_weights(out) if name not in kept]
    if not counts or left:
        raise GraphError(f"{len(left)} matrix products were not quantised: {', '.join(left) or 'there are none'}")
    tables = quantize_embeddings(out)
    check_graph(out)
    return {
        "method": "weights int8 per channel, activations uint8 per token, word embeddings int8 per row",
        "quantized": {**counts, "embeddings": tables},
        "products_in_fp32": kept,
    }


def quantize_products(
    source: Path, out: Path, options: Options = Options(), means: Means = MappingProxyType({})
) -> tuple[list[str], dict[str, int]]:
    """Write `source` with its products in 8 bits; returns the names of those left in float32, and counts.

    Biases of products whose input is in `means` are corrected.
    """
    model = onnx.load(str(source))
    products = products_with_weights(source)
    kept = _fitting(products, options.float32_products)
    rewriter = _Rewriter(model, options, means)
    counts: Counter[str] = Counter()
    for node in list(model.graph.node):
        if node.name in products and node.name not in kept:
            counts[node.op_type] += 1
            rewriter.replace(node)
        elif not rewriter.is_dropped(node):
            rewriter.nodes.append(node)
    rewriter.finish()
    save(model, out)
    return kept, dict(counts)


def mean_inputs(source: Path, calibration: Iterable[Inputs]) -> dict[str, Floats]:
    """The mean over all tokens of every product's input, (inputs,) each; empty without `calibration`."""
    batches = list(calibration)
    if not batches:
        return {}
    model = onnx.load(str(source))
    products = set(products_with_weights(source))
    names = list(dict.fromkeys(node.input[0] for node in model.graph.node if node.name in products))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    totals: dict[str, Any] = dict.fromkeys(names, 0.0)
    counts: dict[str, int] = dict.fromkeys(names, 0)
    session = session_for(model, source.parent)
    for inputs in batches:
        for name, value in zip(names, session.run(names, present_inputs(session, inputs)), strict=True):
            rows = value.reshape(-1, value.shape[-1])
            totals[name] = totals[name] + rows.sum(axis=0, dtype=np.float64)
            counts[name] += len(rows)
    return {name: (totals[name] / counts[name]).astype(np.float32) for name in names}


def quantize_weights(weights: Floats, options: Options = Options()) -> tuple[Int8, Floats]:
    """`weights` (inputs, outputs) as int8 steps of a scale per output, (outputs,): the nearest multiples.

    No two neighbours of one sign in a column sum to more than MAX_NEIGHBOURS steps.
    """
    limit = 2 ** (options.weight_bits - 1) - 1
    scales = np.abs(weights).max(axis=0) / limit
    if options.avoids_saturation and options.weight_bits == 8 and len(weights) > 1:
        first, second = weights[:-1], weights[1:]
        sums = np.where((first > 0) == (second > 0), np.abs(first) + np.abs(second), 0).max(axis=0)
        scales = np.maximum(scales, sums / (MAX_NEIGHBOURS - 1))  # each of the two may round up by half a step
    scales = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    steps = np.clip(np.rint(weights / scales), -limit, limit)
    return steps.astype(np.int8), scales


class _Rewriter:
    """Replaces products of a graph, one by one; what several products read is quantised once."""

    def __init__(self, model: onnx.ModelProto, options: Options, means: Means) -> None:
        self._means = means
        self.nodes: list[onnx.NodeProto] = []
        self._model = model
        self._options = options
        self._weights = {entry.name: entry for entry in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._constants: dict[str, onnx.TensorProto] = {}
        self._activations: dict[str, tuple[str, str, str]] = {}
        self._dropped: set[str] = set()

    def replace(self, node: onnx.NodeProto) -> None:
        """Put the 8-bit product, with its bias, in place of a MatMul, a Gemm or a fused Attention."""
        if node.op_type == "Attention":
            self._replace_attention(node)
            return
        matrix, weights = node.input[1], self._array(node.input[1])
        if node.op_type == "Gemm" and self._is_transposed(node):
            matrix, weights = f"{matrix}/transposed", weights.T
        has_bias = len(node.input) > 2
        out = f"{node.name}/product" if has_bias else node.output[0]
        product = self._product(node.input[0], matrix, weights, out, node.name)
        if has_bias:
            self._add_bias(node, product, self._corrected_bias(node, matrix, weights))

    def is_dropped(self, node: onnx.NodeProto) -> bool:
        """Whether the node was merged into one that was written."""
        return node.name in self._dropped

    def finish(self) -> None:
        """Put the new nodes and constants into the model, and take out the weights that nobody reads."""
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self._constants.values())
        read = {name for node in _with_subgraphs(graph) for name in node.input}
        for entry in [entry for entry in graph.initializer if entry.name not in read]:
            graph.initializer.remove(entry)
        if all(entry.domain != MICROSOFT for entry in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def _is_transposed(self, node: onnx.NodeProto) -> bool:
        """Whether a Gemm reads its weights as (outputs, inputs); GraphError where it does more than it must."""
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        is_transposed = bool(attributes.pop("transB", 0))
        neutral = {"alpha": 1, "beta": 1, "transA": 0}
        if any(attributes.get(name, value) != value for name, value in neutral.items()):
            raise GraphError(f"{node.name} is a Gemm with {attributes}, which is not known to the quantisation")
        return is_transposed

    def _corrected_bias(self, node: onnx.NodeProto, matrix: str, weights: Floats) -> str:
        """The bias, less what the rounding of the weights adds to the product of the mean activation."""
        source, bias = str(node.input[0]), str(node.input[2])
        if source not in self._means or bias not in self._weights:
            return bias
        steps, scales = (onnx.numpy_helper.to_array(self._constants[f"{matrix}/{part}"]) for part in ("int8", "scales"))
        shift = self._means[source] @ (steps * scales - weights)
        return self._constant(f"{node.name}/corrected_bias", (self._array(bias) - shift).astype(np.float32))

    def _add_bias(self, node: onnx.NodeProto, product: str, bias: str) -> None:
        """Add the bias; where only a Gelu reads the sum, both at once."""
        readers = self._readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Gelu" and readers[0].domain == MICROSOFT:
            gelu = readers[0]
            self._dropped.add(gelu.name)
            self._emit("BiasGelu", [product, bias], gelu.output[0], gelu.name, domain=MICROSOFT)
            return
        self._emit("Add", [product, bias], node.output[0], f"{node.name}/bias")

    def _replace_attention(self, node: onnx.NodeProto) -> None:
        """Attention is its three projections and MultiHeadAttention, which takes the same bias and masks."""
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
        """`source` times `weights`, which are known as `matrix`: layers that share it share its 8-bit form."""
        if f"{matrix}/int8" not in self._constants:
            steps, scales = quantize_weights(weights, self._options)
            self._constant(f"{matrix}/int8", steps)
            self._constant(f"{matrix}/scales", scales)
        activation, scale, zero_point = self._quantized(source)
        inputs = [
            activation,
            f"{matrix}/int8",
            self._constant("unit_scale", np.float32(1)),
            f"{matrix}/scales",
            zero_point,
        ]
        whole = self._emit("MatMulIntegerToFloat", inputs, f"{name}/sums", f"{name}/sums", domain=MICROSOFT)
        return self._emit("Mul", [whole, scale], out, name)

    def _quantized(self, source: str) -> tuple[str, str, str]:
        """The activation `source` in 8 bits, its scale per token (..., 1), and its zero point."""
        if source not in self._activations:
            producer = self._producers.get(source)
            limits = AFTER_GELU if producer is not None and producer.op_type in GELUS else SIGNED
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
            self._activations[source] = (whole, scale, zero_point)
        return self._activations[source]

    def _emit(self, operator: str, inputs: Sequence[str], out: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [out], name, **attributes))
        return out

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            self._constants[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def _array(self, name: str) -> Floats:
        array: Floats = onnx.numpy_helper.to_array(self._weights[name])
        return array


def _with_subgraphs(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The graph's nodes, and those of all the branches and loop bodies in it."""
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _with_subgraphs(attribute.g)
    return found


def _fitting(products: Sequence[str], parts: Sequence[str]) -> list[str]:
    for part in parts:
        if not any(part in name for name in products):
            raise GraphError(f"no matrix product is named {part!r}; there are {', '.join(products)}")
    return [name for name in products if any(part in name for part in parts)]


def quantize_embeddings(path: Path) -> int:
    """Store float tables of at least MIN_TABLE_ROWS rows as int8 with a scale per row; returns how many there were.

    Only the rows that are looked up are turned back into floats, so this costs nothing to speak of at run time. It is
    a quarter of a small model's file, and exact to a 254th of each row's largest value.
    """
    model = onnx.load(str(path))
    tables = {entry.name: entry for entry in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    done: list[str] = []
    for node in model.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_embedding(table):
            nodes.append(node)
            continue
        if node.input[0] not in done:
            done.append(node.input[0])
            model.graph.initializer.extend(_quantized_rows(table))
        nodes += _lookup(node)
    for name in done:
        model.graph.initializer.remove(tables[name])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save(model, path)
    return len(done)


def _is_embedding(table: onnx.TensorProto) -> bool:
    return table.data_type == TensorProto.FLOAT and len(table.dims) == 2 and table.dims[0] >= MIN_TABLE_ROWS


def _quantized_rows(table: onnx.TensorProto) -> list[onnx.TensorProto]:
    """The table as int8 (rows, hidden), and its scales as float32 (rows, 1)."""
    values = onnx.numpy_helper.to_array(table)
    scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    rows = np.rint(values / scales).astype(np.int8)
    return [
        onnx.numpy_helper.from_array(rows, f"{table.name}_int8"),
        onnx.numpy_helper.from_array(scales.astype(np.float32), f"{table.name}_scale"),
    ]


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Gather rows and scales, and multiply: the float rows of the node's output."""
    table, ids = node.input[0], node.input[1]
    rows, scales, numbers = (f"{node.output[0]}_{part}" for part in ("int8", "scale", "float"))
    return [
        helper.make_node("Gather", [f"{table}_int8", ids], [rows], f"{node.name}_int8", axis=0),
        helper.make_node("Gather", [f"{table}_scale", ids], [scales], f"{node.name}_scale", axis=0),
        helper.make_node("Cast", [rows], [numbers], f"{node.name}_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", [numbers, scales], [node.output[0]], node.name),
    ]


def products_with_weights(path: Path) -> list[str]:
    """Names of the float products with weights, those of the head left out."""
    model = onnx.load(str(path), load_external_data=False)
    weights = {entry.name for entry in model.graph.initializer if len(entry.dims) == 2}
    head = head_nodes(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTIZED and node.input[1] in weights and node.name not in head
    ]
