"""FP16: half precision where it is safe, found by looking at the values that the float32 graph really computes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime import InferenceSession, NodeArg, SessionOptions
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from cappy_export.graphs.optimum import check_graph, head_nodes, quiet, save

LARGEST = float(np.finfo(np.float16).max)
WORTH_A_WARNING = 2e4

Inputs = Mapping[str, npt.NDArray[np.int64]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Census:
    """Every tensor that a graph computes, and the largest absolute value seen in each float tensor or initializer."""

    tensors: list[NodeArg]
    largest: Mapping[str, float]


def convert_to_half(
    source: Path, out: Path, calibration: Iterable[Inputs], *, runnable: Path | None = None
) -> dict[str, Any]:
    """Write the fp16 model of the float32 model `source`; inputs and output keep their types.

    The regression head stays in float32, and so does every node that reads or writes a value beyond fp16's range
    on `calibration` (model inputs by name). Values inside a fused operator cannot be seen. `runnable` is the same graph
    for the CPU, where `source` does not run there. Returns what is known of the model, for the manifest.
    """
    census = take_census(runnable or source, calibration)
    model = onnx.load(str(source))
    _declare_types(model, census)
    head, overflowing = head_nodes(model), overflowing_nodes(model, census.largest)
    top = max(census.largest.values(), default=0.0)
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


def take_census(source: Path, calibration: Iterable[Inputs]) -> Census:
    """Run the model on `calibration` with every tensor exposed as an output."""
    model = onnx.load(str(source))
    outputs = {entry.name for entry in model.graph.output}
    for node in model.graph.node:
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in node.output if name and name not in outputs
        )
    largest = {
        entry.name: float(np.abs(onnx.numpy_helper.to_array(entry)).max())
        for entry in model.graph.initializer
        if entry.data_type == onnx.TensorProto.FLOAT and 0 not in entry.dims
    }
    session = session_for(model, source.parent)
    del model
    tensors = session.get_outputs()
    for inputs in calibration:
        values = session.run(None, present_inputs(session, inputs))
        for tensor, value in zip(tensors, values, strict=True):
            if tensor.type == "tensor(float)" and value.size:
                largest[tensor.name] = max(float(np.abs(value).max()), largest.get(tensor.name, 0.0))
    return Census(tensors, largest)


def session_for(model: onnx.ModelProto, folder: Path) -> InferenceSession:
    """A session on the CPU for a model in memory, which is written to `folder` for as long as it is read."""
    options = SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, "exposed.onnx")
        onnx.save(model, str(path))
        return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def present_inputs(session: InferenceSession, inputs: Inputs) -> dict[str, npt.NDArray[np.int64]]:
    """Those of `inputs` that the session takes."""
    return {entry.name: inputs[entry.name] for entry in session.get_inputs()}


def overflowing_nodes(model: onnx.ModelProto, largest: Mapping[str, float]) -> set[str]:
    """Names of the nodes that read or write a tensor whose largest value is beyond fp16 (or is not a number)."""
    beyond = {name for name, value in largest.items() if not value <= LARGEST}
    return {node.name for node in model.graph.node if not beyond.isdisjoint([*node.input, *node.output])}


def _join_float32_nodes(model: onnx.ModelProto) -> None:
    """Let values pass between two float32 nodes as they are: the converter casts them to fp16 and back, which loses
    what the nodes were kept in float32 for."""
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
    """Write down every tensor's type: the converter casts only between tensors whose type it knows, and ONNX's own
    inference knows none behind a fused operator."""
    del model.graph.value_info[:]
    outputs = {entry.name for entry in model.graph.output}
    types = {f"tensor({name.lower()})": value for name, value in onnx.TensorProto.DataType.items()}
    for tensor in census.tensors:
        if tensor.name not in outputs and tensor.type in types:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, types[tensor.type], None))
