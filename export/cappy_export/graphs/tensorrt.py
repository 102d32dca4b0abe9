"""Write the graph for TensorRT: padded shapes, and only operators that its parser knows.

TensorRT fuses these patterns itself (attention, Gelu by Erf, layer normalisation), and wants to see them plain.
RoBERTa's position ids are an input, since its parser takes no integer CumSum. The last layer computes only the first
token of each pair. Padding is masked: -10,000 on attention's scores is a weight of exactly 0 after the
softmax in fp32 and fp16.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import TensorProto

from cappy_engine.errors import GraphError
from cappy_export.graphs.parts import BertParts
from cappy_export.graphs.writer import GraphWriter, Weights

TENSORRT_OPSET = 19
"""From 19 on QuantizeLinear takes float16, which int8 with fp16 around it needs; TensorRT 10 reads it."""
MASKED = -10_000.0
PARSED = frozenset(
    "Add Cast CumSum DequantizeLinear Div Erf Gather Gemm LayerNormalization MatMul Mul QuantizeLinear Relu Reshape "
    "Softmax Sub Tanh Transpose Unsqueeze".split()
)
"""Operators that may appear, each supported in fp32 and fp16 (Cast also from int64, Gather by int64) by the table in
onnx-tensorrt's docs/operators.md; CumSum in float only, QuantizeLinear and DequantizeLinear with zero points of 0."""


def plain_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """Write the float32 model of a transformers `config` and `weights` (named as in PyTorch).

    >>> plain_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})

    Inputs `input_ids`, `attention_mask` and `position_ids`, for BERT `token_type_ids`, (batch, length) int64; output
    `logits`, (batch, 1) float32.
    """
    graph = GraphWriter(opset=TENSORRT_OPSET)
    parts = BertParts(graph, config, weights)
    hidden = parts.norm(f"{parts.prefix}.embeddings.LayerNorm", parts.padded_embeddings())
    mask = _mask(graph)
    for number in range(config.num_hidden_layers):
        hidden = _layer(graph, parts, number, hidden, mask, is_last=number == config.num_hidden_layers - 1)
    rows = graph.constant("rows_of_hidden", [-1, config.hidden_size])
    parts.head(graph.add("Reshape", [hidden, rows], "first_tokens"))
    return graph.model(config.model_type, parts.inputs)


def check_operators(model: onnx.ModelProto) -> None:
    """Raise GraphError unless TensorRT's parser takes every operator of the model.

    >>> check_operators(onnx.load("my-bundle/tensorrt/model.onnx"))
    """
    unknown = sorted({node.op_type for node in model.graph.node if node.domain or node.op_type not in PARSED})
    if unknown:
        raise GraphError(f"TensorRT's parser is not known to take {', '.join(unknown)}")


def check_shapes(model: onnx.ModelProto, *, rows: int, length: int) -> None:
    """Raise GraphError unless every tensor has a known shape where the inputs are (rows, length); no weights needed.

    >>> check_shapes(onnx.load("my-bundle/tensorrt/model.onnx", load_external_data=False), rows=2, length=64)
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for entry in fixed.graph.input:
        for axis, size in zip(entry.type.tensor_type.shape.dim, (rows, length), strict=True):
            axis.dim_value = size
    fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = rows
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise GraphError(f"shapes cannot be inferred for {rows} x {length} tokens: {error}") from error
    known = {
        entry.name
        for entry in (*inferred.graph.value_info, *inferred.graph.output)
        if all(axis.HasField("dim_value") for axis in entry.type.tensor_type.shape.dim)
    }
    unknown = [name for node in inferred.graph.node for name in node.output if name not in known]
    if unknown:
        raise GraphError(f"no shape is known for {unknown[0]} and {len(unknown) - 1} more at {rows} x {length} tokens")


def _mask(graph: GraphWriter) -> str:
    """Write the bias of attention's scores: (batch, 1, 1, length), 0 for tokens and MASKED for padding."""
    kept = graph.add("Cast", ["attention_mask"], "mask_float", to=TensorProto.FLOAT)
    padding = graph.add("Sub", [graph.constant("one_float", 1.0), kept], "is_padding")
    bias = graph.add("Mul", [padding, graph.constant("masked", MASKED)], "mask_bias")
    return graph.add("Unsqueeze", [bias, graph.constant("middle_axes", [1, 2])], "mask")


def _layer(graph: GraphWriter, parts: BertParts, number: int, hidden: str, mask: str, *, is_last: bool) -> str:
    """Write one layer: (batch, length, hidden) to the same; the last one to (batch, 1, hidden), the first token."""
    prefix, name = f"{parts.prefix}.encoder.layer.{number}", f"layer.{number}"
    read = hidden
    if is_last:
        read = graph.add("Gather", [hidden, graph.constant("first", [0])], f"{name}/first_token", axis=1)
    context = _attention(graph, parts, f"{prefix}.attention.self", (read, hidden), mask, f"{name}/attention")
    output = _linear(graph, parts, f"{prefix}.attention.output.dense", context, f"{name}/attention/output")
    mixed = graph.add("Add", [output, read], f"{name}/attention/residual")
    middle = parts.norm(f"{prefix}.attention.output.LayerNorm", mixed)
    wide = _linear(graph, parts, f"{prefix}.intermediate.dense", middle, f"{name}/intermediate")
    active = (
        _gelu(graph, wide, name) if parts.config.hidden_act == "gelu" else graph.add("Relu", [wide], f"{name}/relu")
    )
    narrow = _linear(graph, parts, f"{prefix}.output.dense", active, f"{name}/output")
    return parts.norm(f"{prefix}.output.LayerNorm", graph.add("Add", [narrow, middle], f"{name}/output/residual"))


def _attention(
    graph: GraphWriter, parts: BertParts, weights: str, sources: tuple[str, str], mask: str, name: str
) -> str:
    """Let the tokens of the first source attend to those of the second."""
    heads = parts.config.num_attention_heads
    size = parts.config.hidden_size // heads
    split = graph.constant("heads", [0, -1, heads, size])
    read, hidden = sources
    by_head = {}
    for role, source, order in (("query", read, _BY_HEAD), ("key", hidden, _TRANSPOSED), ("value", hidden, _BY_HEAD)):
        projected = _linear(graph, parts, f"{weights}.{role}", source, f"{name}/{role}")
        if role == "query":
            scale = graph.constant("attention_scale", np.float32(1 / math.sqrt(size)))
            projected = graph.add("Mul", [projected, scale], f"{name}/query/scaled")
        cut = graph.add("Reshape", [projected, split], f"{name}/{role}/cut")
        by_head[role] = graph.add("Transpose", [cut], f"{name}/{role}/by_head", perm=order)
    scores = graph.add("MatMul", [by_head["query"], by_head["key"]], f"{name}/scores")
    shares = graph.add("Softmax", [graph.add("Add", [scores, mask], f"{name}/masked")], f"{name}/shares", axis=-1)
    mixed = graph.add("MatMul", [shares, by_head["value"]], f"{name}/mixed")
    joined = graph.add("Transpose", [mixed], f"{name}/joined", perm=_BY_HEAD)
    return graph.add("Reshape", [joined, graph.constant("joined", [0, -1, heads * size])], f"{name}/context")


_BY_HEAD = [0, 2, 1, 3]
_TRANSPOSED = [0, 2, 3, 1]


def _linear(graph: GraphWriter, parts: BertParts, weights: str, hidden: str, name: str) -> str:
    product = graph.add("MatMul", [hidden, parts.matrix(weights)], f"{name}/product")
    return graph.add("Add", [product, parts.bias(weights)], name)


def _gelu(graph: GraphWriter, hidden: str, name: str) -> str:
    """Write the exact Gelu, in the five operators that TensorRT knows it by."""
    scaled = graph.add("Div", [hidden, graph.constant("root_of_two", math.sqrt(2))], f"{name}/gelu/scaled")
    above = graph.add(
        "Add", [graph.add("Erf", [scaled], f"{name}/gelu/erf"), graph.constant("one_float", 1.0)], f"{name}/gelu/one"
    )
    return graph.add(
        "Mul", [graph.add("Mul", [hidden, above], f"{name}/gelu/product"), graph.constant("half", 0.5)], f"{name}/gelu"
    )
