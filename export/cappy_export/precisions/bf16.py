"""Write bf16: weights in bfloat16, which halves them, and products of bfloat16 values with sums in float32.

A product with weights becomes an operator of `graphs/operators.py`, with the Gelu or the residual and layer norm behind
it. Its activations are rounded to bfloat16 there, and its sum, layer norms, softmax and the head are in float32. Word
embeddings are in float16 with a scale per row, which is as small and more exact.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from cappy_engine.errors import GraphError
from cappy_engine.native.operands import BF16_GROUP, PANEL
from cappy_engine.native.reference import bf16_bits, pack
from cappy_export.graphs.files import check_graph, save
from cappy_export.graphs.operators import DOMAIN, with_functions
from cappy_export.precisions.embeddings import quantize_embeddings
from cappy_export.precisions.float_graph import FloatGraph, joined_with, multi_head, put_nodes
from cappy_export.precisions.int8 import products_with_weights
from cappy_export.precisions.rounding import Floats

METHOD = "weights and activations of products bf16, sums fp32, word embeddings fp16"


def convert_to_bf16(source: Path, out: Path) -> dict[str, Any]:
    """Write the bf16 model of the float32 model `source`; return the facts for the manifest.

    >>> convert_to_bf16(Path("model.onnx"), Path("model_bf16.onnx"))["converted"]
    {'Gemm': 25, 'embeddings': 1}

    A product whose weights do not fill whole panels stays in float32. Raises GraphError if all do.
    """
    model = onnx.load(str(source))
    rewriter = _Rewriter(model, products_with_weights(source))
    for node in list(model.graph.node):
        rewriter.take(node)
    rewriter.finish()
    save(model, out)
    kept = products_with_weights(out)
    if not rewriter.counts:
        raise GraphError(f"no matrix product could be converted to bf16; there are {', '.join(kept) or 'none'}")
    tables = quantize_embeddings(out, 16)
    check_graph(out)
    return {"method": METHOD, "converted": {**rewriter.counts, "embeddings": tables}, "products_in_fp32": kept}


class _Rewriter:
    """Replaces the products of a graph, one by one; `counts` those that were replaced, by operator."""

    def __init__(self, model: onnx.ModelProto, products: list[str]) -> None:
        self.counts: Counter[str] = Counter()
        self._model = model
        self._products = products
        self._graph = FloatGraph(model)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._joined: dict[str, onnx.NodeProto | None] = {}

    def take(self, node: onnx.NodeProto) -> None:
        """Take the graph's next node: replace it if it is one of the products, else keep it."""
        if node.name in self._joined:
            joined = self._joined[node.name]
            self._nodes += [] if joined is None else [joined]
        elif node.name not in self._products or not self._is_replaced(node):
            self._nodes.append(node)

    def finish(self) -> None:
        """Put the new nodes and constants into the model; take out weights that nobody reads."""
        put_nodes(self._model, self._nodes, self._constants.values())
        with_functions(self._model)

    def _is_replaced(self, node: onnx.NodeProto) -> bool:
        """Write an operator in place of a product and what it takes in; False if its weights fill no whole panels."""
        weights, is_transposed = self._graph.weights_of(node)
        matrix = f"{node.input[1]}/transposed" if is_transposed else node.input[1]
        parts = np.split(weights, 3, axis=1) if node.op_type == "Attention" else [weights]
        inner, columns = parts[0].shape
        bias = self._graph.weights.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
        is_known = bias is not None or node.op_type != "Gemm" or len(node.input) < 3
        if inner % BF16_GROUP or columns % PANEL or not is_known or (bias is not None and list(bias.dims) != [columns]):
            return False
        self.counts[node.op_type] += 1
        if node.op_type == "Attention":
            names = [f"{node.name}/{role}" for role in ("query", "key", "value")]
            for name, part in zip(names, parts, strict=True):
                self._add("Bf16Linear", [node.input[0], self._packed(name, part), self._no_bias(columns)], name, name)
            self._nodes.append(multi_head(node, names))
        elif bias is None:
            inputs = [node.input[0], self._packed(matrix, weights), self._no_bias(columns)]
            self._add("Bf16Linear", inputs, node.output[0], node.name)
        else:
            self._join(node, [node.input[0], self._packed(matrix, weights), node.input[2]])
        return True

    def _join(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        joined = joined_with(self._graph, node)
        attributes: dict[str, Any] = {"activation": "gelu"} if joined.operator == "LinearGelu" else {}
        if joined.epsilon is not None:
            attributes["epsilon"] = joined.epsilon
        operator, inputs = f"Bf16{joined.operator}", [*inputs, *joined.inputs]
        self._joined.update((taken.name, None) for taken in joined.taken)
        if joined.epsilon is None:
            self._add(operator, inputs, joined.output, node.name, **attributes)
        else:  # in the norm's place: the residual may be computed after this product
            last = helper.make_node(operator, inputs, [joined.output], node.name, domain=DOMAIN, **attributes)
            self._joined[joined.taken[-1].name] = last

    def _packed(self, matrix: str, weights: Floats) -> str:
        name = f"{matrix}/bf16"
        if name not in self._constants:
            bits = pack(bf16_bits(weights), BF16_GROUP)
            stored = helper.make_tensor(name, TensorProto.BFLOAT16, bits.shape, bits.tobytes(), raw=True)
            self._constants[name] = stored
        return name

    def _no_bias(self, columns: int) -> str:
        name = f"no_bias_{columns}"
        self._constants[name] = onnx.numpy_helper.from_array(np.zeros(columns, np.float32), name)
        return name

    def _add(self, operator: str, inputs: list[str], out: str, name: str, **attributes: Any) -> None:
        self._nodes.append(helper.make_node(operator, inputs, [out], name, domain=DOMAIN, **attributes))
