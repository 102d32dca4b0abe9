"""The models for GPUs: written, converted, and made runnable on the CPU, where they are proven.

"cuda": ONNX Runtime's fused operators, padding removed (packed.py); fp32 and fp16. "tensorrt": standard operators
(plain.py); fp32, fp16, and int8 with explicit quantisation around fp16 (qdq.py). fp16 keeps in float32 the head, and
what overflows on calibration pairs (half.py).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from cappy_engine.bundle import TARGETS
from cappy_engine.errors import ExportError, GraphError
from cappy_export.checkpoints.checkpoint import Checkpoint
from cappy_export.graphs.cuda import packed_model, packing_counts
from cappy_export.graphs.optimum import build_direct_graph, save
from cappy_export.graphs.stand_ins import emulated
from cappy_export.graphs.tensorrt import check_operators, check_shapes, plain_model
from cappy_export.graphs.writer import is_written_directly
from cappy_export.precisions.fp16 import Inputs, convert_to_half
from cappy_export.precisions.int8_tensorrt import activation_ranges, quantize_explicitly

GPU_TARGETS = tuple(target for target in TARGETS if target != "cpu")
Calibration = Callable[[], Iterable[Inputs]]


def check_target_precisions(targets: Sequence[str], precisions: Sequence[str]) -> dict[str, list[str]]:
    """The precisions of each target, of those that were asked for.

    Raises ValueError for an unknown target, ExportError for a precision or a target that would come to nothing.
    """
    unknown = [name for name in targets if name not in TARGETS]
    if isinstance(targets, str) or unknown or not targets:
        raise ValueError(f"targets must be a list from {', '.join(TARGETS)}, got {targets!r}")
    chosen = {
        target: [name for name in TARGETS[target] if name in precisions] for target in TARGETS if target in targets
    }
    for target, found in chosen.items():
        if not found:
            raise ExportError(f"{target} runs {', '.join(TARGETS[target])}, not {', '.join(precisions)}")
    for precision in precisions:
        if not any(precision in found for found in chosen.values()):
            raise ExportError(f"{precision} does not run on {', '.join(chosen)}; add a --target that runs it")
    return chosen


def write_target(
    checkpoint: Checkpoint,
    staging: Path,
    target: str,
    precisions: Sequence[str],
    calibration: Calibration,
    buckets: Sequence[int],
) -> dict[str, Any]:
    """Write the models of `precisions` for "cuda" or "tensorrt" into `staging`; returns what is known of each.

    Raises GraphError for an architecture whose graph is not written directly, and unless the graph is what the device
    needs: all operators fused, or known to TensorRT with shapes known for every one of `buckets`.
    """
    if not is_written_directly(checkpoint.config):
        kind = checkpoint.config["model_type"]
        raise GraphError(f"models for {target} are written for BERT and RoBERTa; {checkpoint.name} is a {kind}")
    files = {name: staging / file for name, file in TARGETS[target].items()}
    files["fp32"].parent.mkdir()
    with tempfile.TemporaryDirectory(dir=staging) as temporary:
        folder = Path(temporary)
        steps = {name: file if name in precisions else folder / file.name for name, file in files.items()}
        shape = build_direct_graph(checkpoint, steps["fp32"], packed_model if target == "cuda" else plain_model)
        facts: dict[str, dict[str, Any]] = {"fp32": {}}
        if {"fp16", "int8"} & set(precisions):
            runnable = runnable_on_cpu(steps["fp32"], target, folder)
            facts["fp16"] = convert_to_half(steps["fp32"], steps["fp16"], calibration(), runnable=runnable)
        if "int8" in precisions:
            largest = activation_ranges(steps["fp32"], calibration())
            facts["int8"] = {**facts["fp16"], **quantize_explicitly(steps["fp16"], steps["int8"], largest)}
    has_gelu = checkpoint.config.get("hidden_act", "gelu") == "gelu"
    wanted = packing_counts(shape["layers"], has_gelu=has_gelu) if target == "cuda" else {}
    return {
        name: {
            "written_by": "cappy-export",
            "unpadded": target == "cuda",
            **_check(onnx.load(str(files[name]), load_external_data=False), target, wanted, buckets),
            **facts[name],
        }
        for name in precisions
    }


def runnable_on_cpu(model: Path, target: str, folder: Path) -> Path:
    """A model that the CPU provider runs with the same weights: `model` itself, or its twin in `folder`."""
    if target != "cuda":
        return model
    twin = folder / f"emulated-{model.name}"
    save(emulated(onnx.load(str(model))), twin)
    return twin


def _check(model: onnx.ModelProto, target: str, wanted: Mapping[str, int], buckets: Sequence[int]) -> dict[str, Any]:
    """What is known of the graph, if it is what the device needs: see `write_target`."""
    if target == "cuda":
        counts = Counter(node.op_type for node in model.graph.node)
        if any(counts[name] != count for name, count in wanted.items()):
            raise GraphError(f"the graph for CUDA has {dict(counts)}, and {wanted} is needed")
        return {"fused": dict(wanted)}
    check_operators(model)
    for bucket in buckets:
        check_shapes(model, rows=2, length=bucket)
    return {"inputs": [entry.name for entry in model.graph.input]}
