"""Write the models for GPUs, and make them runnable on CPUs for the proof.

"cuda" has ONNX Runtime's fused operators, padding removed (`graphs/cuda.py`), in fp32 and fp16. "tensorrt" has standard
operators (`graphs/tensorrt.py`), in fp32, fp16, and int8 with explicit quantisation around fp16
(`precisions/int8_tensorrt.py`). fp16 keeps the head in float32, and every node that overflows on calibration pairs.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from transformers import PreTrainedModel

from cappy_engine.buckets import choose_buckets, default_buckets
from cappy_engine.bundle import TARGETS
from cappy_engine.errors import GraphError
from cappy_export.checkpoints.checkpoint import Checkpoint
from cappy_export.graphs.build import build_direct_graph
from cappy_export.graphs.cuda import packed_model, packing_counts
from cappy_export.graphs.files import MAX_BYTES, save
from cappy_export.graphs.half import is_half, round_in_float32
from cappy_export.graphs.optimum import check_size
from cappy_export.graphs.stand_ins import emulated
from cappy_export.graphs.tensorrt import check_operators, check_shapes, plain_model
from cappy_export.graphs.writer import is_written_for_gpus
from cappy_export.options import ExportOptions, Say
from cappy_export.precisions.calibration import CalibrationPairs, activation_ranges, open_exposed
from cappy_export.precisions.fp16 import convert_to_half
from cappy_export.precisions.int8_tensorrt import quantize_explicitly

BUCKETS = 4
"""The most lengths that TensorRT gets where no other number is asked for."""


def check_gpu_models(checkpoint: Checkpoint, model: PreTrainedModel, options: ExportOptions) -> None:
    """Raise GraphError for what cannot be made for GPUs of this checkpoint: it is known before any work.

    >>> check_gpu_models(checkpoint, shape_model(checkpoint), ExportOptions(targets=("cuda",)))
    """
    for target in options.for_gpus:
        if not is_written_for_gpus(checkpoint.config):
            told = ("model_type", "hidden_act", "position_embedding_type")
            found = ", ".join(f"{key} {checkpoint.config[key]}" for key in told if key in checkpoint.config)
            raise GraphError(
                f"models for {target} are written for BERT and RoBERTa with GELU or ReLU and absolute positions; "
                f"{checkpoint.name} has {found}"
            )
    if options.for_gpus:
        check_size(model, checkpoint, MAX_BYTES)


def write_gpu_models(
    checkpoint: Checkpoint,
    staging: Path,
    options: ExportOptions,
    calibration: CalibrationPairs,
    buckets: Sequence[int],
    say: Say,
) -> dict[str, Any]:
    """Write the models for GPUs into `staging`; return the manifest's "targets".

    >>> write_gpu_models(checkpoint, staging, ExportOptions(targets=("cuda",)), calibration, [64, 512], print)

    The checkpoint is one that `check_gpu_models` takes. Raises GraphError for a graph that the device would not run as
    it is meant: all operators fused for CUDA, and all shapes known for TensorRT at every one of `buckets`.
    """
    found: dict[str, Any] = {}
    for target, precisions in options.for_gpus.items():
        say(f"building the graphs for {target}: {', '.join(precisions)}")
        graphs = _write_target(checkpoint, staging, target, precisions, calibration, buckets)
        found[target] = {"precisions": list(precisions), "graphs": graphs}
        if target == "tensorrt":
            found[target]["buckets"] = list(buckets)
    return found


def choose_lengths(token_counts: npt.NDArray[np.int64] | None, buckets: int, *, max_length: int) -> tuple[int, ...]:
    """Choose at most `buckets` lengths for TensorRT.

    >>> choose_lengths(None, 2, max_length=512)
    (256, 512)

    They suit pairs of these `token_counts`; without any they are the longest default ones.
    """
    if token_counts is None:
        return default_buckets(max_length)[-buckets:]
    values, counts = np.unique(token_counts, return_counts=True)
    lengths = {int(length): int(count) for length, count in zip(values, counts, strict=True)}
    return choose_buckets(lengths, buckets, max_length=max_length)


def runnable_on_cpu(model: Path, target: str, folder: Path) -> Path:
    """Return a model that the CPU provider runs with the same weights: `model` itself, or its twin in `folder`.

    >>> runnable_on_cpu(Path("my-bundle/cuda/model.onnx"), "cuda", Path("work"))
    PosixPath('work/emulated-model.onnx')

    The twin has stand-ins for CUDA's operators, and rounds to fp16 wherever the graph says that a value is fp16.
    """
    runnable, twin = model, folder / f"emulated-{model.name}"
    if target == "cuda":
        save(emulated(onnx.load(str(model))), twin)
        runnable = twin
    if is_half(onnx.load(str(runnable), load_external_data=False)):
        tensors = open_exposed(runnable, folder=folder).get_outputs()
        halves = {tensor.name for tensor in tensors if tensor.type == "tensor(float16)"}
        save(round_in_float32(onnx.load(str(runnable)), halves), twin)
        runnable = twin
    return runnable


def _write_target(
    checkpoint: Checkpoint,
    staging: Path,
    target: str,
    precisions: Sequence[str],
    calibration: CalibrationPairs,
    buckets: Sequence[int],
) -> dict[str, Any]:
    """Write the models of `precisions` for one target; return the facts of each."""
    files = {name: staging / file for name, file in TARGETS[target].items()}
    files["fp32"].parent.mkdir()
    with tempfile.TemporaryDirectory(dir=staging) as temporary:
        folder = Path(temporary)
        steps = {name: file if name in precisions else folder / file.name for name, file in files.items()}
        shape = build_direct_graph(checkpoint, steps["fp32"], packed_model if target == "cuda" else plain_model)
        facts: dict[str, dict[str, Any]] = {"fp32": {}}
        if {"fp16", "int8"} & set(precisions):
            runnable = runnable_on_cpu(steps["fp32"], target, folder)
            facts["fp16"] = convert_to_half(steps["fp32"], steps["fp16"], calibration.inputs(), runnable=runnable)
        if "int8" in precisions:
            largest = activation_ranges(steps["fp32"], calibration.inputs())
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


def _check(model: onnx.ModelProto, target: str, wanted: Mapping[str, int], buckets: Sequence[int]) -> dict[str, Any]:
    """Check that the graph is what the device needs (see `write_gpu_models`); return the facts that this tells."""
    if target == "cuda":
        counts = Counter(node.op_type for node in model.graph.node)
        if any(counts[name] != count for name, count in wanted.items()):
            raise GraphError(f"the graph for CUDA has {dict(counts)}, and {wanted} is needed")
        return {"fused": dict(wanted)}
    check_operators(model)
    for bucket in buckets:
        check_shapes(model, rows=2, length=bucket)
    return {"inputs": [entry.name for entry in model.graph.input]}
