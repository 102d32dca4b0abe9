"""INT8: dynamic quantisation of a fused float32 graph.

Weights are 8 bits *unsigned* per output channel, activations 8 bits per tensor at run time; word embeddings are 8 bits
with a scale per row; LayerNorm and the head stay in float32. Unsigned, since on CPUs without VNNI ONNX Runtime's signed
kernel (u8s8) adds pairs of products in 16 bits and saturates. The usual remedy, 7-bit weights, is some 10% faster than
this, but doubled the error on random weights. `python -m benchmarks.int8_options` measures the alternatives; README.md
has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from cappy_engine.errors import GraphError
from cappy_export.graph import check_graph, count_nodes, head_nodes, quiet

QUANTIZED = ("MatMul", "Attention")
MIN_TABLE_ROWS = 1024
"""Tables of words have more rows than this, those of positions and token types fewer."""
REPLACEMENTS = ("MatMulInteger", "DynamicQuantizeMatMul", "QAttention")


def quantize(source: Path, out: Path, *, float32_products: Sequence[str] = ()) -> dict[str, Any]:
    """Write the int8 model of the fused float32 model `source`; returns what is known of it, for the manifest.

    Products whose names hold one of `float32_products` stay in float32. Raises GraphError if one of these fits no
    product, and unless every other product with weights but those of the head was quantised.
    """
    products = products_with_weights(source)
    kept = _fitting(products, float32_products)
    quantize_with(
        source,
        out,
        op_types=QUANTIZED,
        per_channel=True,
        reduce_range=False,
        weight_type=QuantType.QUInt8,
        excluded=kept,
    )
    left = [name for name in products_with_weights(out) if name not in kept]
    if not products or left:
        raise GraphError(
            f"{len(left)} of {len(products)} matrix products were not quantised: {', '.join(left) or 'none'}"
        )
    tables = quantize_embeddings(out)
    check_graph(out)
    nodes = count_nodes(out)
    replaced = {name: nodes[name] for name in REPLACEMENTS if nodes[name]}
    return {
        "method": "dynamic, weights uint8 per channel, activations uint8 per tensor, word embeddings int8 per row",
        "quantized": {**replaced, "embeddings": tables},
        "products_in_fp32": kept,
    }


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
    onnx.save(model, str(path))
    return len(done)


def _is_embedding(table: onnx.TensorProto) -> bool:
    return table.data_type == onnx.TensorProto.FLOAT and len(table.dims) == 2 and table.dims[0] >= MIN_TABLE_ROWS


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
        onnx.helper.make_node("Gather", [f"{table}_int8", ids], [rows], f"{node.name}_int8", axis=0),
        onnx.helper.make_node("Gather", [f"{table}_scale", ids], [scales], f"{node.name}_scale", axis=0),
        onnx.helper.make_node("Cast", [rows], [numbers], f"{node.name}_float", to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", [numbers, scales], [node.output[0]], node.name),
    ]


def products_with_weights(path: Path) -> list[str]:
    """Names of the float products with weights, those of the head left out."""
    model = onnx.load(str(path), load_external_data=False)
    weights = {entry.name for entry in model.graph.initializer}
    head = head_nodes(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTIZED and node.input[1] in weights and node.name not in head
    ]


def quantize_with(
    source: Path,
    out: Path,
    *,
    op_types: tuple[str, ...],
    per_channel: bool,
    reduce_range: bool,
    weight_type: QuantType,
    excluded: Sequence[str] = (),
) -> None:
    """ONNX Runtime's `quantize_dynamic` with the options that fused graphs need; the head and the nodes `excluded` are
    left in float32.

    A head's Gemm becomes a MatMul of a longer name before it is looked up, so both names are excluded.
    """
    head = head_nodes(onnx.load(str(source), load_external_data=False))
    with quiet():
        quantize_dynamic(
            source,
            out,
            op_types_to_quantize=list(op_types),
            per_channel=per_channel,
            reduce_range=reduce_range,
            weight_type=weight_type,
            nodes_to_exclude=sorted({*head, *(f"{name}_MatMul" for name in head), *excluded}),
            # products of two activations stay float32; outputs of fused operators have no inferred type
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
