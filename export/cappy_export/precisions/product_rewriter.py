"""Replace the products of a float32 graph, node by node. Each precision of the CPU says what takes their place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import helper

from cappy_export.graphs.operators import DOMAIN, with_functions
from cappy_export.graphs.writer import MICROSOFT
from cappy_export.precisions.float_graph import FloatGraph, joined_with, put_nodes


class ProductRewriter(ABC):
    """Replace the products of `model` that are named, each by what a subclass writes.

    >>> Int8Rewriter(model, Int8Options(), {"layer.0/dense"}, {}).rewrite()
    """

    def __init__(self, model: onnx.ModelProto, products: Collection[str]) -> None:
        self._model = model
        self._products = products
        self._graph = FloatGraph(model)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._joined: dict[str, onnx.NodeProto | None] = {}

    def rewrite(self) -> None:
        """Replace the products, and take out weights that nobody reads any more."""
        for node in list(self._model.graph.node):
            self._take(node)
        put_nodes(self._model, self._nodes, self._constants.values())
        domains = {entry.domain for entry in self._model.opset_import}
        if MICROSOFT not in domains and any(node.domain == MICROSOFT for node in self._nodes):
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        with_functions(self._model)

    @abstractmethod
    def _replace(self, node: onnx.NodeProto) -> bool:
        """Write what takes the product's place; False if it stays as it is."""

    def _take(self, node: onnx.NodeProto) -> None:
        if node.name in self._joined:
            joined = self._joined[node.name]
            self._nodes += [] if joined is None else [joined]
        elif node.name not in self._products or not self._replace(node):
            self._nodes.append(node)

    def _join(self, node: onnx.NodeProto, inputs: Sequence[str], *, prefix: str = "", **attributes: Any) -> None:
        """Write a Gemm as one operator with what alone reads its sum: Gelu, a residual, or residual and layer norm.

        `prefix` stands before the operator's name. `inputs` are those of the product with its bias.
        """
        joined = joined_with(self._graph, node)
        if joined.operator == "LinearGelu":
            attributes["activation"] = "gelu"
        if joined.epsilon is not None:
            attributes["epsilon"] = joined.epsilon
        operator, inputs = prefix + joined.operator, [*inputs, *joined.inputs]
        whole = helper.make_node(operator, inputs, [joined.output], node.name, domain=DOMAIN, **attributes)
        self._joined.update((taken.name, None) for taken in joined.taken)
        if joined.inputs:  # in the last one's place: the residual may be computed after this product
            self._joined[joined.taken[-1].name] = whole
        else:
            self._nodes.append(whole)

    def _emit(self, operator: str, inputs: Sequence[str], out: str, name: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [out], name, **attributes))
        return out

    def _constant(self, name: str, value: Any) -> str:
        """Add a constant, once; its array, or how it is stored."""
        if name not in self._constants:
            is_stored = isinstance(value, onnx.TensorProto)
            self._constants[name] = value if is_stored else onnx.numpy_helper.from_array(np.asarray(value), name)
        return name
