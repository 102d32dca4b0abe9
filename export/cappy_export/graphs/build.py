"""Turn a checkpoint into a float32 ONNX graph with dynamic batch and length: the one place that decides from where.

The families of `families.py` are written from their weights. optimum exports everything else (`optimum.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from cappy_export.checkpoints.checkpoint import Checkpoint, load_model
from cappy_export.graphs.families import family_of
from cappy_export.graphs.files import check_graph, save
from cappy_export.graphs.optimum import build_fused_graph, shape_of
from cappy_export.graphs.writer import OPSET, Weights


def build_graph(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Write the checkpoint's graph for CPUs to `path`; return the model's shape and the facts for the manifest.

    >>> shape, facts = build_graph(open_checkpoint("export/cappy_mini/checkpoint"), Path("model.onnx"))

    Inputs, output and errors are those of `build_fused_graph`. `unpadded` among the facts says that the graph computes
    nothing for padding.
    """
    family = family_of(checkpoint.config)
    if family is None:
        return build_fused_graph(checkpoint, path)
    shape = build_direct_graph(checkpoint, path, family.write)
    return shape, {"written_by": "cappy-export", "opset": OPSET, "unpadded": True}


def build_direct_graph(
    checkpoint: Checkpoint, path: Path, write: Callable[[Any, Weights], onnx.ModelProto]
) -> dict[str, int]:
    """Write to `path` the graph that `write` makes of the checkpoint's config and weights; return its shape.

    >>> build_direct_graph(checkpoint, Path("model.onnx"), encoder_model)["layers"]
    6
    """
    model = load_model(checkpoint, is_quiet=True)  # the reference's was loaded before
    shape, config = shape_of(model), model.config
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    del model
    save(write(config, weights), path)
    check_graph(path)
    return shape


def model_shape(checkpoint: Checkpoint) -> dict[str, int]:
    """Count layers, heads, hidden size and parameters.

    >>> model_shape(open_checkpoint("export/cappy_mini/checkpoint"))["layers"]
    6
    """
    return shape_of(load_model(checkpoint, is_quiet=True))
