"""Write bf16: weights in bfloat16, which halves them, and products of bfloat16 values with sums in float32.

A product with weights becomes an operator of `graphs/operators.py`, with the Gelu, the residual, or residual and layer
norm behind it. Its activations are rounded to bfloat16 there, and its sum, layer norms, softmax and the head are in
float32. Word embeddings are in float16 with a scale per row, which is as small and more exact.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from cappy_engine.errors import GraphError
from cappy_engine.native.operands import BF16_GROUP, PANEL
from cappy_engine.native.reference import bf16_bits, pack
from cappy_export.graphs.files import check_graph, save
from cappy_export.graphs.operators import DOMAIN
from cappy_export.precisions.embeddings import quantize_embeddings
from cappy_export.precisions.float_graph import multi_head
from cappy_export.precisions.int8 import products_with_weights
from cappy_export.precisions.product_rewriter import ProductRewriter
from cappy_export.precisions.rounding import Floats

METHOD = "weights and activations of products bf16, sums fp32, word embeddings fp16"


def convert_to_bf16(source: Path, out: Path) -> dict[str, Any]:
    """Write the bf16 model of the float32 model `source`; return the facts for the manifest.

    >>> convert_to_bf16(Path("model.onnx"), Path("model_bf16.onnx"))["converted"]
    {'Gemm': 25, 'embeddings': 1}

    A product whose weights do not fill whole panels stays in float32. Raises GraphError if all do.
    """
    model = onnx.load(str(source))
    rewriter = _Bf16Rewriter(model, products_with_weights(source))
    rewriter.rewrite()
    save(model, out)
    kept = products_with_weights(out)
    if not rewriter.counts:
        raise GraphError(f"no matrix product could be converted to bf16; there are {', '.join(kept) or 'none'}")
    tables = quantize_embeddings(out, 16)
    check_graph(out)
    return {"method": METHOD, "converted": {**rewriter.counts, "embeddings": tables}, "products_in_fp32": kept}


class _Bf16Rewriter(ProductRewriter):
    """Write bfloat16 products in place of a graph's. `counts` tells how many of each operator were replaced."""

    def __init__(self, model: onnx.ModelProto, products: list[str]) -> None:
        super().__init__(model, products)
        self.counts: Counter[str] = Counter()

    def _replace(self, node: onnx.NodeProto) -> bool:
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
                self._multiply(node.input[0], self._packed(name, part), columns, name, name)
            self._nodes.append(multi_head(node, names))
        elif bias is None:
            self._multiply(node.input[0], self._packed(matrix, weights), columns, node.output[0], node.name)
        else:
            self._join(node, [node.input[0], self._packed(matrix, weights), node.input[2]], prefix="Bf16")
        return True

    def _multiply(self, source: str, weights: str, columns: int, out: str, name: str) -> None:
        """Write a product without a bias."""
        no_bias = self._constant(f"no_bias_{columns}", np.zeros(columns, np.float32))
        self._emit("Bf16Linear", [source, weights, no_bias], out, name, domain=DOMAIN)

    def _packed(self, matrix: str, weights: Floats) -> str:
        name = f"{matrix}/bf16"
        if name in self._constants:
            return name
        bits = pack(bf16_bits(weights), BF16_GROUP)
        stored = helper.make_tensor(name, TensorProto.BFLOAT16, bits.shape, bits.tobytes(), raw=True)
        return self._constant(name, stored)
