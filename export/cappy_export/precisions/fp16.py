"""Write fp16: half precision where the values that the float32 graph really computes allow it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from cappy_export.graphs.files import check_graph, head_nodes, quiet, save
from cappy_export.precisions.calibration import Census, Inputs, take_census

LARGEST = float(np.finfo(np.float16).max)
WORTH_A_WARNING = 2e4

log = logging.getLogger(__name__)


def convert_to_half(
    source: Path, out: Path, calibration: Iterable[Inputs], *, runnable: Path | None = None
) -> dict[str, Any]:
    """Write the fp16 model of the float32 model `source`; inputs and output keep their types.

    >>> convert_to_half(Path("model.onnx"), Path("model_fp16.onnx"), pairs.inputs())["method"]
    'fp16'

    The regression head stays in float32, and so does every node that reads or writes a value beyond fp16's range
    on `calibration`. Values inside a fused operator cannot be seen. `runnable` is the same graph for the CPU, where
    `source` does not run there. Returns the facts for the manifest.
    """
    census = take_census(runnable or source, calibration)
    model = onnx.load(str(source))
    _declare_types(model, census)
    head, overflowing = head_nodes(model), overflowing_nodes(model, census.largest)
    top = max(filter(isfinite, census.largest.values()), default=0.0)
    if WORTH_A_WARNING < top <= LARGEST:
        log.warning("the largest value of the float32 graph, %.0f, is near fp16's limit of %.0f", top, LARGEST)
    with quiet():
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=DEFAULT_OP_BLOCK_LIST,
            node_block_list=sorted(head | overflowing),
        )
        _join_float32_nodes(half)
        converted = OnnxModel(half)
        converted.prune_graph()
        converted.topological_sort()
    save(converted.model, out)
    check_graph(out)
    return {
        "method": "fp16",
        "head_in_fp32": sorted(head),
        "overflowing_in_fp32": sorted(overflowing),
        "largest_value": top,
    }


def overflowing_nodes(model: onnx.ModelProto, largest: Mapping[str, float]) -> set[str]:
    """Name the nodes that read or write a value beyond fp16, or NaN.

    >>> overflowing_nodes(onnx.load("model.onnx"), {"layer.0/intermediate/dense": 1e5})
    """
    beyond = {name for name, value in largest.items() if not value <= LARGEST}
    return {node.name for node in model.graph.node if not beyond.isdisjoint([*node.input, *node.output])}


def _join_float32_nodes(model: onnx.ModelProto) -> None:
    """Let values pass between two float32 nodes as they are.

    The converter casts them to fp16 and back, which loses the range that the nodes were kept in float32 for.
    """
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    for node in casts.values():
        before = casts.get(node.input[0])
        if (
            before is not None
            and _target(node) == onnx.TensorProto.FLOAT
            and _target(before) == onnx.TensorProto.FLOAT16
        ):
            node.input[0] = before.input[0]


def _target(cast: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")


def _declare_types(model: onnx.ModelProto, census: Census) -> None:
    """Write down every tensor's type, which the converter must know to cast.

    ONNX's own inference knows no type behind a fused operator.
    """
    del model.graph.value_info[:]
    outputs = {entry.name for entry in model.graph.output}
    types = {f"tensor({name.lower()})": value for name, value in onnx.TensorProto.DataType.items()}
    for tensor in census.tensors:
        if tensor.name not in outputs and tensor.type in types:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, types[tensor.type], None))
