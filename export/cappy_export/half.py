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

from cappy_export.graph import check_graph, quiet

LARGEST = float(np.finfo(np.float16).max)
WORTH_A_WARNING = 2e4

Inputs = Mapping[str, npt.NDArray[np.int64]]

BODY_ENDS = ("SkipLayerNormalization", "LayerNormalization", "Gather", "Slice")
"""What the head reads: the last layer's output, or the first token of it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Census:
    """Every tensor that a graph computes: its type, and the largest absolute value seen in the float ones."""

    tensors: list[NodeArg]
    largest: Mapping[str, float]


def convert_to_half(source: Path, out: Path, calibration: Iterable[Inputs]) -> dict[str, Any]:
    """Write the fp16 model of the float32 model `source`; inputs and output keep their types.

    The regression head stays in float32, and so does every node one of whose outputs leaves fp16's range on
    `calibration` (model inputs by name). Values inside a fused operator cannot be seen. Returns what is known of the
    model, for the manifest.
    """
    census = take_census(source, calibration)
    model = onnx.load(str(source))
    _name_nodes(model)
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
        converted = OnnxModel(half)
        converted.topological_sort()
    onnx.save(converted.model, str(out))
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
    options = SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        exposed = Path(folder, "exposed.onnx")
        onnx.save(model, str(exposed))
        del model
        session = InferenceSession(str(exposed), options, providers=["CPUExecutionProvider"])
    largest: dict[str, float] = {}
    tensors = session.get_outputs()
    for inputs in calibration:
        values = session.run(None, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
        for tensor, value in zip(tensors, values, strict=True):
            if tensor.type == "tensor(float)" and value.size:
                largest[tensor.name] = max(float(np.abs(value).max()), largest.get(tensor.name, 0.0))
    return Census(tensors, largest)


def overflowing_nodes(model: onnx.ModelProto, largest: Mapping[str, float]) -> set[str]:
    """Names of the nodes with an output whose largest value is beyond fp16 (or is not a number)."""
    return {
        node.name for node in model.graph.node if any(not largest.get(name, 0.0) <= LARGEST for name in node.output)
    }


def head_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes between the last layer's output and the logits."""
    producers = {name: node for node in model.graph.node for name in node.output}
    found: set[str] = set()
    waiting = [entry.name for entry in model.graph.output]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.name not in found and node.op_type not in BODY_ENDS:
            found.add(node.name)
            waiting.extend(node.input)
    return found


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name: the converter knows nodes by it."""
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_unnamed_{number}"


def _declare_types(model: onnx.ModelProto, census: Census) -> None:
    """Write down every tensor's type: the converter casts only between tensors whose type it knows, and ONNX's own
    inference knows none behind a fused operator."""
    del model.graph.value_info[:]
    outputs = {entry.name for entry in model.graph.output}
    types = {f"tensor({name.lower()})": value for name, value in onnx.TensorProto.DataType.items()}
    for tensor in census.tensors:
        if tensor.name not in outputs and tensor.type in types:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, types[tensor.type], None))
