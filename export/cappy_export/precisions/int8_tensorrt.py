"""Write int8 for TensorRT: explicit QuantizeLinear and DequantizeLinear around the products of a float graph.

TensorRT takes symmetric int8 only: weights with a scale per output channel, activations with one scale each. Those are
fixed at export, by the float32 graph's values on calibration pairs, so this int8 depends on the pairs; the CPU's takes
its scales when it runs. Scales have the graph's own float type (fp16), in which everything else stays: attention's
products, layer normalisations and Gelu. The head stays in float32.

One scale for a whole activation is coarse, since a few channels are much larger than the others (28 to 3 after
cappy-mini's attention). SmoothQuant (arXiv 2211.10438, equation 4) moves that into the weights: channel j is divided by
s_j, and row j of the weights is multiplied by it. In the paper the division is part of layer normalisation. Residuals
read BERT's layer normalisations, too, so here it is an operator before QuantizeLinear; TensorRT fuses the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from cappy_engine.errors import GraphError
from cappy_export.graphs.files import check_graph, head_nodes, save
from cappy_export.precisions.rounding import LARGEST_STEP, Floats

SMOOTHING = 0.8
"""The share of the difficulty that goes into the weights. The paper takes 0.5, or 0.75 where channels differ a lot; on
cappy-mini 0.5 gives a rank correlation of 0.872 with PyTorch, 0.6 0.971, 0.75 0.988, 0.8 0.991, 0.9 0.988."""
SMALLEST = float(np.finfo(np.float16).tiny)


def quantize_explicitly(source: Path, out: Path, largest: Mapping[str, Floats]) -> dict[str, Any]:
    """Write the model `source` with its products with weights in int8; return the facts for the manifest.

    >>> quantize_explicitly(Path("model_fp16.onnx"), Path("model_int8.onnx"), activation_ranges(fp32, pairs.inputs()))

    `largest` holds the largest absolute values, (channels,), of every activation that such a product reads
    (`calibration.activation_ranges`). Raises GraphError where one is missing, or nothing is quantised.
    """
    model = onnx.load(str(source))
    graph = model.graph
    weights = {entry.name: entry for entry in graph.initializer if len(entry.dims) == 2}
    head = head_nodes(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and node.name not in head:
            readers.setdefault(node.input[0], []).append(node)
    if not readers:
        raise GraphError(f"{source.name} has no product to quantise")
    producers = {name: node for node in graph.node for name in node.output}
    before: dict[str, list[onnx.NodeProto]] = {}
    for activation, products in readers.items():
        channels = largest.get(_before_casts(activation, producers))
        if channels is None:
            raise GraphError(f"no range is known for {activation}, which {products[0].name} reads")
        before[products[0].name] = _quantize(graph, activation, products, weights, channels)
    nodes = [found for node in graph.node for found in (*before.get(node.name, []), node)]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int8), "int8_zero"))
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    for entry in [entry for entry in graph.initializer if entry.name not in read]:
        graph.initializer.remove(entry)
    save(model, out)
    check_graph(out)
    return {
        "method": "explicit Q/DQ, weights int8 per channel, activations int8 per tensor, smoothed",
        "quantized": sum(map(len, readers.values())),
    }


def smoothing_factors(activation: Floats, weights: Floats, smoothing: float) -> Floats:
    """Compute SmoothQuant's s, (channels,), from the largest values of each channel of activation and weights.

    >>> smoothing_factors(np.float32([4, 1]), np.float32([1, 1]), 1.0).tolist()
    [2.0, 0.5]
    """
    activation, weights = np.maximum(activation, 1e-5), np.maximum(weights, 1e-5)
    factors: Floats = (activation**smoothing / weights ** (1 - smoothing)).astype(np.float32)
    return factors / np.float32(np.exp(np.log(factors).mean()))  # around 1, where fp16 has most precision


def _quantize(
    graph: onnx.GraphProto,
    activation: str,
    products: list[onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
    largest: Floats,
) -> list[onnx.NodeProto]:
    """Make the products that read `activation` read int8; return the nodes that go before them."""
    matrices = {node.input[1]: onnx.numpy_helper.to_array(weights[node.input[1]]) for node in products}
    dtype = next(iter(matrices.values())).dtype
    rows = np.max([np.abs(matrix).max(axis=1) for matrix in matrices.values()], axis=0).astype(np.float32)
    factors = smoothing_factors(largest, rows, SMOOTHING)
    scale = dtype.type(max(float((largest / factors).max()) / LARGEST_STEP, SMALLEST))
    _constant(graph, f"{activation}/smoothing", (1 / factors).astype(dtype))
    _constant(graph, f"{activation}/scale", np.array(scale))
    smooth, steps, back = f"{activation}/smooth", f"{activation}/int8", f"{activation}/dequantized"
    nodes = [
        helper.make_node("Mul", [activation, f"{activation}/smoothing"], [smooth], smooth),
        helper.make_node("QuantizeLinear", [smooth, f"{activation}/scale", "int8_zero"], [steps], steps),
        helper.make_node("DequantizeLinear", [steps, f"{activation}/scale", "int8_zero"], [back], back),
    ]
    for name, matrix in matrices.items():
        inputs = _quantized_matrix(graph, name, matrix.astype(np.float32) * factors[:, None], dtype)
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}/float"], f"{name}/float", axis=1))
    for node in products:
        node.input[:] = [back, f"{node.input[1]}/float"]
    return nodes


def _quantized_matrix(graph: onnx.GraphProto, name: str, matrix: Floats, dtype: Any) -> list[str]:
    """Add (inputs, outputs) as int8, with scales and zero points (outputs,); return the names of the three."""
    scales = np.maximum(np.abs(matrix).max(axis=0) / LARGEST_STEP, SMALLEST).astype(dtype)
    steps = np.clip(np.rint(matrix / scales.astype(np.float32)), -LARGEST_STEP, LARGEST_STEP).astype(np.int8)
    _constant(graph, f"{name}/int8", steps)
    _constant(graph, f"{name}/scales", scales)
    zeros = helper.make_tensor(f"{name}/zeros", TensorProto.INT8, [len(scales)], [0] * len(scales))
    graph.initializer.append(zeros)
    return [f"{name}/int8", f"{name}/scales", f"{name}/zeros"]


def _constant(graph: onnx.GraphProto, name: str, value: npt.NDArray[Any]) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(value, name))


def _before_casts(name: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """Find the tensor's name in the float32 graph: the conversion to fp16 put casts between nodes."""
    while name in producers and producers[name].op_type == "Cast":
        name = producers[name].input[0]
    return name
