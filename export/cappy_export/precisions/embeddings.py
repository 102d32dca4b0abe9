"""Store word embeddings in fewer bits. Only rows that are looked up are turned back, in hardly any time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from cappy_export.graphs.files import save

MIN_TABLE_ROWS = 1024
"""Tables of words have more rows than this, those of positions and token types fewer."""

Small = type[np.int8] | type[np.float16]


def quantize_embeddings(path: Path, kind: Small = np.int8) -> int:
    """Store large float tables as `kind` with a scale per row; return how many there were.

    >>> quantize_embeddings(Path("model_quantized.onnx"))
    1

    Tables of at least MIN_TABLE_ROWS rows are large. In int8 a small model's file is a quarter smaller, and a value is
    exact to a 254th of its row's largest; in float16 to a 2048th of itself.
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
            model.graph.initializer.extend(_scaled_rows(table, kind))
        nodes += _lookup(node)
    for name in done:
        model.graph.initializer.remove(tables[name])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save(model, path)
    return len(done)


def _is_embedding(table: onnx.TensorProto) -> bool:
    return table.data_type == TensorProto.FLOAT and len(table.dims) == 2 and table.dims[0] >= MIN_TABLE_ROWS


def _scaled_rows(table: onnx.TensorProto, kind: Small) -> list[onnx.TensorProto]:
    """Turn a table into `kind` (rows, hidden), 127 at most, and scales (rows, 1) float32."""
    values = onnx.numpy_helper.to_array(table)
    scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    scaled = values / scales
    rows = np.rint(scaled).astype(np.int8) if kind is np.int8 else scaled.astype(np.float16)
    return [
        onnx.numpy_helper.from_array(rows, f"{table.name}_rows"),
        onnx.numpy_helper.from_array(scales.astype(np.float32), f"{table.name}_scale"),
    ]


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Write the nodes that gather rows and scales, and multiply them."""
    table, ids = node.input[0], node.input[1]
    rows, scales, numbers = (f"{node.output[0]}_{part}" for part in ("rows", "scale", "float"))
    return [
        helper.make_node("Gather", [f"{table}_rows", ids], [rows], f"{node.name}_rows", axis=0),
        helper.make_node("Gather", [f"{table}_scale", ids], [scales], f"{node.name}_scale", axis=0),
        helper.make_node("Cast", [rows], [numbers], f"{node.name}_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", [numbers, scales], [node.output[0]], node.name),
    ]
