"""Export a checkpoint of any architecture with optimum, and fuse its graph for ONNX Runtime.

The graph is in float32. fp16 is made from it, since its operators have half-precision versions on GPUs. For a
family that `families.py` does not have, all other graphs are made from it, too.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from transformers import PreTrainedModel

from cappy_engine.errors import GraphError
from cappy_export.checkpoints.checkpoint import Checkpoint, float32_bytes, load_model
from cappy_export.checkpoints.refusals import full_disk
from cappy_export.graphs.files import MAX_BYTES, check_graph, quiet, save
from cappy_export.graphs.writer import MICROSOFT, OPSET, ROBERTAS

_WHOLE_LAYER = {"Attention": 1, "SkipLayerNormalization": 2, "BiasGelu": 1}
FUSED_PER_LAYER: Mapping[str, Mapping[str, int]] = {
    **dict.fromkeys((*ROBERTAS, "bert", "electra", "data2vec-text", "ibert"), _WHOLE_LAYER),
    "distilbert": {"SkipLayerNormalization": 2, "BiasGelu": 1},  # its attention mask is a pattern that is not known
}
"""Fused nodes that one layer of an architecture gives. Of other architectures they are counted, but not demanded."""

log = logging.getLogger(__name__)


def build_fused_graph(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Write the checkpoint's graph, exported by optimum and fused, to `path`; return the model's shape and the facts.

    >>> shape, facts = build_fused_graph(open_checkpoint("export/cappy_mini/checkpoint"), Path("fused.onnx"))

    Inputs `input_ids`, `attention_mask` (and `token_type_ids` where the architecture has them), (batch, length) int64;
    output `logits`, (batch, 1) float32. Raises GraphError if the model is too large for one file, the exporter fails,
    an axis is not dynamic, or fewer nodes were fused than the layers demand.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder, "raw.onnx")
        shape = _export_with_optimum(checkpoint, raw)
        fused = _fuse(raw, path, heads=shape["heads"], hidden_size=shape["hidden_size"])
    check_fusions(fused, checkpoint.config, layers=shape["layers"])
    check_graph(path)
    return shape, {"written_by": "optimum", "opset": OPSET, "unpadded": False, "fused": fused}


def demanded_fusions(config: Mapping[str, Any], *, layers: int) -> dict[str, int]:
    """Count the nodes of each fused kind that a graph of this architecture must have.

    >>> demanded_fusions({"model_type": "distilbert"}, layers=6)
    {'SkipLayerNormalization': 12, 'BiasGelu': 6}
    """
    if config.get("position_embedding_type", "absolute") != "absolute":
        return {}  # attention adds relative positions to its scores, a pattern that is not known
    per_layer = FUSED_PER_LAYER.get(config["model_type"], {})
    has_gelu = config.get("hidden_act", config.get("activation", "gelu")) == "gelu"
    return {name: count * layers for name, count in per_layer.items() if name != "BiasGelu" or has_gelu}


def check_fusions(fused: Mapping[str, int], config: Mapping[str, Any], *, layers: int) -> None:
    """Raise GraphError if fewer nodes were fused than `demanded_fusions` says: the model would be right, but slow.

    >>> check_fusions({"SkipLayerNormalization": 12, "BiasGelu": 6}, {"model_type": "distilbert"}, layers=6)
    """
    demanded = demanded_fusions(config, layers=layers)
    lacking = [
        f"{fused.get(name, 0)} of {count} {name}" for name, count in demanded.items() if fused.get(name, 0) < count
    ]
    if lacking:
        raise GraphError(
            f"ONNX Runtime fused only {', '.join(lacking)}: the exporter wrote a pattern that it does not know; "
            "use the package versions of constraints.txt"
        )
    if not demanded:
        log.warning("%s: fused %s; more is not known to be possible", config["model_type"], dict(fused) or "nothing")


def check_size(model: PreTrainedModel, checkpoint: Checkpoint, most_bytes: int) -> None:
    """Raise GraphError if the weights have more than `most_bytes` in float32."""
    size_bytes = float32_bytes(checkpoint, model)
    if size_bytes > most_bytes:
        raise GraphError(
            f"{checkpoint.name} has {size_bytes / 1e9:.1f} GB of float32 weights; more than {most_bytes / 1e9:.1f} GB "
            "can be exported only of the architectures that are written directly, in fp32, bf16 and int8 for CPUs"
        )


def check_exportable(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise GraphError if the model is too large for one file, or unknown to optimum.

    >>> checkpoint = open_checkpoint("export/cappy_mini/checkpoint")
    >>> check_exportable(checkpoint, shape_model(checkpoint))

    optimum must know the model's architecture. The check takes seconds, and no weights.
    """
    check_size(model, checkpoint, MAX_BYTES)
    with _explained(checkpoint):
        _exporter_config(model)


def shape_of(model: PreTrainedModel) -> dict[str, int]:
    """Count layers, heads, hidden size and parameters."""
    return {
        "layers": int(model.config.num_hidden_layers),
        "heads": int(model.config.num_attention_heads),
        "hidden_size": int(model.config.hidden_size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _export_with_optimum(checkpoint: Checkpoint, path: Path) -> dict[str, int]:
    """Write the unfused graph, and return the model's shape. The model is freed on return: fusing needs the memory."""
    from optimum.exporters.onnx import convert

    model = load_model(checkpoint, is_quiet=True)
    check_size(model, checkpoint, MAX_BYTES)
    with _explained(checkpoint):
        convert.export(model, _exporter_config(model), path, opset=OPSET)
    return shape_of(model)


def _exporter_config(model: PreTrainedModel) -> Any:
    """Take what optimum knows of the architecture; raises whatever it raises where it knows nothing."""
    import optimum.exporters.onnx.model_configs  # noqa: F401  (registers the architectures)
    from optimum.exporters.tasks import TasksManager

    make_config = TasksManager.get_exporter_config_constructor(
        "onnx", model, task="text-classification", library_name="transformers"
    )
    return make_config(model.config)


@contextlib.contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Silence optimum, and raise GraphError for its errors.

    Errors of the system, such as a full disk, are raised as such.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # optimum, torch and onnx raise whatever they like
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if full := full_disk(error):
            raise full from error
        kind = checkpoint.config["model_type"]
        raise GraphError(f"optimum cannot export {checkpoint.name} (model type {kind}): {error}") from error


def _fuse(source: Path, out: Path, *, heads: int, hidden_size: int) -> dict[str, int]:
    """Fuse for ONNX Runtime's CPU and CUDA providers, which both have these operators; return counts of fused nodes."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_by_fusion

    options = FusionOptions("bert")
    options.enable_shape_inference = False  # no fusion needs it, and it triples the memory (10 GB for cappy-large)
    with quiet():
        optimized = optimize_by_fusion(onnx.load(str(source)), "bert", heads, hidden_size, options)
        for number, node in enumerate(optimized.model.graph.node):
            node.name = node.name or f"{node.op_type}_unnamed_{number}"  # the converters know nodes by name
        optimized.topological_sort()
        if all(entry.domain != MICROSOFT for entry in optimized.model.opset_import):
            optimized.model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        save(optimized.model, out)
    return {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
