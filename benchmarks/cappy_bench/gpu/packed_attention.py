"""Writes the other form of a graph for CUDA, with PackedAttention, to measure both. Needs what exports need."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from cappy_engine.errors import GraphError


def with_packed_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put PackedAttention in the place of attentions and their three projections; the same object is returned.

    >>> onnx.save(with_packed_attention(onnx.load("my-bundle/cuda/model_fp16.onnx")), "packed_attention.onnx")

    The model may be float32 or fp16. Raises GraphError for one without PackedMultiHeadAttention, and where
    values are cast between the projections and the attention.
    """
    graph = model.graph
    producers = {node.output[0]: node for node in graph.node}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    attentions = [node for node in graph.node if node.op_type == "PackedMultiHeadAttention"]
    if not attentions:
        raise GraphError("the model has no PackedMultiHeadAttention; it is not one for CUDA, or an older one")
    for attention in attentions:
        projections = [producers[name] for name in attention.input[:3]]
        if not {node.op_type for node in projections} <= {"Gemm", "MatMul"}:
            raise GraphError(f"{attention.name} does not read its projections as they are")
        matrices = [numpy_helper.to_array(constants[node.input[1]]) for node in projections]
        joined = {
            f"{attention.name}.matrix": np.concatenate(matrices, axis=1),
            f"{attention.name}.bias": np.concatenate(
                [
                    numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.zeros_like(matrix[0])
                    for node, matrix in zip(projections, matrices, strict=True)
                ]
            ),
        }
        replaced = {name for node in projections for name in node.input[1:]}
        for node in projections:
            graph.node.remove(node)
        for name in replaced:
            graph.initializer.remove(constants[name])
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in joined.items())
        attention.op_type = "PackedAttention"
        attention.input[:] = [projections[0].input[0], *joined, *attention.input[4:]]
    return model
