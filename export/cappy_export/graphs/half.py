"""Compute an fp16 graph on a CPU. Round every value that is fp16 in the graph.

A GPU does not round more often than that. Where TensorRT fuses operators, it rounds less often. ONNX Runtime has hardly
any fp16 operators for CPUs. It computes the others in float32, between casts, and removes the casts between two of
them. So values would stay in float32, and a proof would miss a good part of the error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper


def is_half(model: onnx.ModelProto) -> bool:
    """Tell whether a model has weights in fp16.

    >>> is_half(onnx.load("my-bundle/cuda/model_fp16.onnx"))
    True
    """
    return any(entry.data_type == TensorProto.FLOAT16 for entry in model.graph.initializer)


def round_in_float32(model: onnx.ModelProto, half: Collection[str]) -> onnx.ModelProto:
    """Make `model` compute in float32 and round its tensors `half` to fp16; the same object is returned.

    >>> round_in_float32(onnx.load("my-bundle/tensorrt/model_fp16.onnx"), ["layer.0/attention"])

    `half` names all tensors that are fp16, but weights. Values inside an operator are not rounded. The outputs of
    DequantizeLinear are not rounded either: the device multiplies the 8-bit numbers. Zero points must be 0, as
    TensorRT's are.
    """
    for entry in model.graph.initializer:
        _widen(entry)
    nodes = [node for original in model.graph.node for node in _rounding(original, half)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # they have the old types
    return model


def _rounding(node: onnx.NodeProto, half: Collection[str]) -> Iterator[onnx.NodeProto]:
    """Yield the node in float32, and casts that round its outputs."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            _widen(attribute.t)
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
    if node.op_type == "DequantizeLinear":  # as it stands, ONNX Runtime would fuse it: some CPUs' 8-bit sums saturate
        steps, scale, (out,) = node.input[0], node.input[1], node.output
        yield helper.make_node("Cast", [steps], [f"{out}/steps"], f"{out}/steps", to=TensorProto.FLOAT)
        yield helper.make_node("Mul", [f"{out}/steps", scale], [out], node.name)
        return
    written = [name for name in node.output if name in half]
    for place, name in enumerate(node.output):
        if name in written:
            node.output[place] = f"{name}/exact"
    yield node
    for name in written:
        yield helper.make_node("Cast", [f"{name}/exact"], [f"{name}/fp16"], f"{name}/round", to=TensorProto.FLOAT16)
        yield helper.make_node("Cast", [f"{name}/fp16"], [name], f"{name}/widen", to=TensorProto.FLOAT)


def _widen(tensor: onnx.TensorProto) -> None:
    """Store an fp16 tensor's values in float32."""
    if tensor.data_type == TensorProto.FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
