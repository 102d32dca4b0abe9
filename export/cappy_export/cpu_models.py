"""Write the models for CPUs: fp32, and fp16, bf16 and int8 made from it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cappy_engine.bundle import MODEL_FILES
from cappy_export.checkpoints.checkpoint import Checkpoint
from cappy_export.graphs.build import build_graph, model_shape
from cappy_export.graphs.families import family_of
from cappy_export.graphs.operators import operators_of
from cappy_export.graphs.optimum import build_fused_graph, check_exportable
from cappy_export.options import ExportOptions, Say
from cappy_export.precisions.bf16 import convert_to_bf16
from cappy_export.precisions.calibration import (
    INT8_CALIBRATION_PAIRS,
    CalibrationPairs,
    Inputs,
)
from cappy_export.precisions.fp16 import convert_to_half
from cappy_export.precisions.int8 import fitting, products_with_weights, quantize


def check_cpu_models(checkpoint: Checkpoint, model: PreTrainedModel, options: ExportOptions) -> None:
    """Raise GraphError for what cannot be made for CPUs of this checkpoint: it is known before any work.

    >>> check_cpu_models(checkpoint, shape_model(checkpoint), ExportOptions(precisions=("fp16",)))
    """
    if "fp16" in options.for_cpus or (options.for_cpus and family_of(checkpoint.config) is None):
        check_exportable(checkpoint, model)


def write_cpu_models(
    checkpoint: Checkpoint, staging: Path, options: ExportOptions, calibration: CalibrationPairs, say: Say
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Write the CPU's models into `staging`; return the model's shape, and the facts of every graph.

    >>> shape, graphs = write_cpu_models(checkpoint, staging, ExportOptions(), calibration, print)

    The fp32 model, from which the others are made, is written even where it was not asked for, and so it is proven.
    Raises GraphError.
    """
    if not options.for_cpus:
        return model_shape(checkpoint), {}
    (staging / "onnx").mkdir()
    say("building the fp32 graph")
    fp32 = staging / MODEL_FILES["fp32"]
    shape, facts = build_graph(checkpoint, fp32)
    graphs = {"fp32": facts}
    if options.float32_products:  # one that is not there is found before the other conversions
        fitting(products_with_weights(fp32), options.float32_products)
    if "fp16" in options.for_cpus:
        say("converting to fp16")
        source = None if facts["unpadded"] else fp32
        graphs["fp16"] = _write_half(checkpoint, source, staging / MODEL_FILES["fp16"], calibration.inputs())
    if "bf16" in options.for_cpus:
        say("converting to bf16")
        graphs["bf16"] = {**convert_to_bf16(fp32, staging / MODEL_FILES["bf16"]), "unpadded": facts["unpadded"]}
    if "int8" in options.for_cpus:
        say("quantising to int8")
        int8 = quantize(
            fp32,
            staging / MODEL_FILES["int8"],
            calibration.inputs(INT8_CALIBRATION_PAIRS),
            float32_products=options.float32_products,
        )
        graphs["int8"] = {**int8, "unpadded": facts["unpadded"]}
    written = {precision: operators_of(staging / MODEL_FILES[precision]) for precision in graphs}
    return shape, {precision: {**facts, "operators": written[precision]} for precision, facts in graphs.items()}


def _write_half(checkpoint: Checkpoint, fused: Path | None, out: Path, calibration: Iterable[Inputs]) -> dict[str, Any]:
    """Write fp16 from the model `fused`, or from one that is made for it; return its facts."""
    if fused is not None:
        return {**convert_to_half(fused, out, calibration), "unpadded": False}
    with tempfile.TemporaryDirectory(dir=out.parent.parent) as folder:
        made = Path(folder, "fused.onnx")
        build_fused_graph(checkpoint, made)
        return {**convert_to_half(made, out, calibration), "unpadded": False}
