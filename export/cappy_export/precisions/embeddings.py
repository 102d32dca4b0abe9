"""Store embeddings in fewer bits. Only rows that are looked up are turned back, in hardly any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from cappy_export.graphs.files import save
from cappy_export.precisions.rounding import Floats

MIN_TABLE_ROWS = 1024
"""Tables of words have more rows than this, those of positions and token types fewer."""
LARGEST = {8: 127, 12: 2047, 16: 127}
"""The largest value of a row, in steps of its scale; with 16 bits (float16) a step has fractions."""

Bits = Literal[8, 12, 16]


def quantize_embeddings(path: Path, bits: Bits = 12) -> int:
    """Store large float tables in `bits` with a scale per row; return how many there were.

    >>> quantize_embeddings(Path("model_quantized.onnx"))
    1

    Tables of at least MIN_TABLE_ROWS rows are large. A value is exact to a 254th of its row's largest in 8 bits, to a
    4094th in 12, and in 16 to a 2048th of itself. 12 bits are a byte, and half a byte of another table: two columns
    share one there, so that rows of an odd number of values get 16 bits.
    """
    model = onnx.load(str(path))
    tables = {entry.name: entry for entry in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    done: dict[str, Bits] = {}
    for node in model.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_embedding(table):
            nodes.append(node)
            continue
        if table.name not in done:
            done[table.name] = 16 if bits == 12 and table.dims[1] % 2 else bits
            model.graph.initializer.extend(_stored(table, done[table.name]))
        nodes += _lookup_halves(node) if done[table.name] == 12 else _lookup(node)
    for name in done:
        model.graph.initializer.remove(tables[name])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    save(model, path)
    return len(done)


def _is_embedding(table: onnx.TensorProto) -> bool:
    return table.data_type == TensorProto.FLOAT and len(table.dims) == 2 and table.dims[0] >= MIN_TABLE_ROWS


def _stored(table: onnx.TensorProto, bits: Bits) -> list[onnx.TensorProto]:
    """Turn a table into rows (rows, hidden) and scales (rows, 1). With 12 bits, add halves (rows, hidden / 2)."""
    values: Floats = onnx.numpy_helper.to_array(table)
    scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / LARGEST[bits]
    scaled = values / scales
    parts: dict[str, Any] = {"scale": scales.astype(np.float32)}
    if bits == 12:
        whole = np.rint(scaled).astype(np.int16)
        first, second = np.split((whole & 15).astype(np.uint8), 2, axis=1)
        parts |= {"rows": (whole >> 4).astype(np.int8), "halves": first | second << 4, **_CONSTANTS}
    else:
        parts["rows"] = np.rint(scaled).astype(np.int8) if bits == 8 else scaled.astype(np.float16)
    return [onnx.numpy_helper.from_array(np.asarray(part), f"{table.name}_{name}") for name, part in parts.items()]


_CONSTANTS = {"mask": np.uint8(15), "shift": np.uint8(4), "sixteen": np.float32(16)}


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Write the nodes that gather rows and scales, and multiply them."""
    numbers = f"{node.output[0]}_float"
    return [
        *_gathered(node, "rows", "scale"),
        helper.make_node("Cast", [f"{node.output[0]}_rows"], [numbers], f"{node.name}_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", [numbers, f"{node.output[0]}_scale"], [node.output[0]], node.name),
    ]


def _lookup_halves(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Write the nodes that gather rows, halves and scales. They compute (16 rows + halves) scales."""
    table, out, name = node.input[0], node.output[0], node.name
    steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("BitwiseAnd", [f"{out}_halves", f"{table}_mask"], "first", {}),
        ("BitShift", [f"{out}_halves", f"{table}_shift"], "second", {"direction": "RIGHT"}),
        ("Concat", [f"{out}_first", f"{out}_second"], "low", {"axis": -1}),
        ("Cast", [f"{out}_low"], "low_float", {"to": TensorProto.FLOAT}),
        ("Cast", [f"{out}_rows"], "high_float", {"to": TensorProto.FLOAT}),
        ("Mul", [f"{out}_high_float", f"{table}_sixteen"], "high", {}),
        ("Add", [f"{out}_high", f"{out}_low_float"], "whole", {}),
    )
    return [
        *_gathered(node, "rows", "halves", "scale"),
        *(
            helper.make_node(kind, read, [f"{out}_{part}"], f"{name}_{part}", **attributes)
            for kind, read, part, attributes in steps
        ),
        helper.make_node("Mul", [f"{out}_whole", f"{out}_scale"], [out], name),
    ]


def _gathered(node: onnx.NodeProto, *parts: str) -> list[onnx.NodeProto]:
    """Write the nodes that look up the rows of each of the table's `parts`."""
    table, ids, out = node.input[0], node.input[1], node.output[0]
    return [
        helper.make_node("Gather", [f"{table}_{part}", ids], [f"{out}_{part}"], f"{node.name}_{part}", axis=0)
        for part in parts
    ]
