"""INT8: dynamic quantisation of a fused float32 graph.

Weights are 8 bits *unsigned* per output channel, activations 8 bits per tensor at run time; embeddings, LayerNorm and
the head stay in float32. Unsigned, since on CPUs without VNNI ONNX Runtime's signed kernel (u8s8) adds pairs of
products in 16 bits and saturates. The usual remedy, 7-bit weights, is some 10% faster than this, but doubled the error
on random weights. `python -m benchmarks.int8_options` measures the alternatives; README.md has the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from cappy_engine.errors import GraphError
from cappy_export.graph import check_graph, count_nodes, head_nodes, quiet

QUANTIZED = ("MatMul", "Attention")
REPLACEMENTS = ("MatMulInteger", "DynamicQuantizeMatMul", "QAttention")


def quantize(source: Path, out: Path) -> dict[str, Any]:
    """Write the int8 model of the fused float32 model `source`; returns what is known of it, for the manifest.

    Raises GraphError unless every product with weights but those of the head was quantised.
    """
    quantize_with(source, out, op_types=QUANTIZED, per_channel=True, reduce_range=False, weight_type=QuantType.QUInt8)
    wanted, left = products_with_weights(source), products_with_weights(out)
    if not wanted or left:
        raise GraphError(
            f"{len(left)} of {len(wanted)} matrix products were not quantised: {', '.join(left) or 'none'}"
        )
    check_graph(out)
    nodes = count_nodes(out)
    replaced = {name: nodes[name] for name in REPLACEMENTS if nodes[name]}
    return {"method": "dynamic, weights uint8 per channel, activations uint8 per tensor", "quantized": replaced}


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
    source: Path, out: Path, *, op_types: tuple[str, ...], per_channel: bool, reduce_range: bool, weight_type: QuantType
) -> None:
    """ONNX Runtime's `quantize_dynamic` with the options that fused graphs need; the head is left in float32.

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
            nodes_to_exclude=sorted({*head, *(f"{name}_MatMul" for name in head)}),
            # products of two activations stay float32; outputs of fused operators have no inferred type
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
