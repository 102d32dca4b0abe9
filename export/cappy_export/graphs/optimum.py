"""From a checkpoint to a float32 ONNX graph with dynamic batch and length.

`build_graph` is the one place that decides where the graph comes from: BERT and RoBERTa are written from their weights
(encoder.py), everything else is exported by optimum and fused for ONNX Runtime. `build_fused_graph` is the latter for
any architecture: fp16 is made from it, since its operators have half-precision versions on GPUs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import set_external_data
from transformers import PreTrainedModel

from cappy_engine.bundle import EXTERNAL_SUFFIX
from cappy_engine.errors import GraphError
from cappy_engine.session import INPUTS
from cappy_export.checkpoints.checkpoint import Checkpoint, load_model
from cappy_export.graphs.cpu import encoder_model
from cappy_export.graphs.writer import MICROSOFT, OPSET, Weights, is_written_directly

MAX_BYTES = 2**31 - 2**24
"""What one ONNX file can hold (protobuf's limit), less some space for the graph itself."""
EXTERNAL_BYTES = 2**27
EXTERNAL_TENSOR_BYTES = 2**14
AXES = ["batch_size", "sequence_length"]
_WHOLE_LAYER = {"Attention": 1, "SkipLayerNormalization": 2, "BiasGelu": 1}
FUSED_PER_LAYER: Mapping[str, Mapping[str, int]] = {
    **dict.fromkeys(("roberta", "bert", "xlm-roberta", "camembert", "electra", "data2vec-text", "ibert"), _WHOLE_LAYER),
    "distilbert": {"SkipLayerNormalization": 2, "BiasGelu": 1},  # its attention mask is a pattern that is not known
}
"""Fused nodes that one layer of an architecture gives; for others what fuses is counted, but not demanded."""

BODY_ENDS = ("SkipLayerNormalization", "LayerNormalization", "Gather", "Slice")
"""What the head reads: the last layer's output, or the first token of it."""

log = logging.getLogger(__name__)


def build_graph(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Write the checkpoint's graph for CPUs to `path`; returns the model's shape and what is known of the graph.

    Inputs, output and errors are those of `build_fused_graph`. `unpadded` among the facts says that the graph computes
    nothing for padding.
    """
    if not is_written_directly(checkpoint.config):
        return build_fused_graph(checkpoint, path)
    shape = build_direct_graph(checkpoint, path, encoder_model)
    return shape, {"written_by": "cappy-export", "opset": OPSET, "unpadded": True}


def build_direct_graph(
    checkpoint: Checkpoint, path: Path, write: Callable[[Any, Weights], onnx.ModelProto]
) -> dict[str, int]:
    """Write to `path` the graph that `write` makes of the checkpoint's config and weights; returns its shape."""
    model = _load(checkpoint)
    shape, config = _shape(model), model.config
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    del model
    save(write(config, weights), path)
    check_graph(path)
    return shape


def model_shape(checkpoint: Checkpoint) -> dict[str, int]:
    """Layers, heads, hidden size and number of parameters."""
    return _shape(_load(checkpoint))


def build_fused_graph(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Write the checkpoint's graph, exported by optimum and fused, to `path`; returns the model's shape and the facts.

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
    """How many nodes of each fused kind a graph of this architecture must have."""
    if config.get("position_embedding_type", "absolute") != "absolute":
        return {}  # attention adds relative positions to its scores, a pattern that is not known
    per_layer = FUSED_PER_LAYER.get(config["model_type"], {})
    has_gelu = config.get("hidden_act", config.get("activation", "gelu")) == "gelu"
    return {name: count * layers for name, count in per_layer.items() if name != "BiasGelu" or has_gelu}


def check_fusions(fused: Mapping[str, int], config: Mapping[str, Any], *, layers: int) -> None:
    """Raise GraphError if fewer nodes were fused than `demanded_fusions` says: the model would be right, but slow."""
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


def check_graph(path: Path) -> None:
    """Raise GraphError unless onnx.checker accepts the model and its axes and opset are what a bundle promises."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise GraphError(f"onnx.checker refuses {path.name}: {error}") from error
    model = onnx.load(str(path), load_external_data=False)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset < 17:
        raise GraphError(f"{path.name} has opset {opset}; at least 17 is needed")
    names = [entry.name for entry in model.graph.input]
    if not {"input_ids"} <= set(names) <= set(INPUTS):
        raise GraphError(f"{path.name} takes {', '.join(names)}; of a pair there are only {', '.join(INPUTS)}")
    for entry in (*model.graph.input, *model.graph.output):
        axes = [axis.dim_param or axis.dim_value for axis in entry.type.tensor_type.shape.dim]
        if axes != ([AXES[0], 1] if entry.name == "logits" else AXES):
            raise GraphError(f"{entry.name} of {path.name} has the axes {axes}; the exporter specialised one")


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model to `path`, and the weights of a large one to a file beside it, named as other tools expect.

    ONNX Runtime maps such a file instead of copying it: cappy-large's fp32 loads in 1.2 s and 1.25 GB instead of 3 s
    and 2.2 GB.
    """
    beside = path.with_name(path.name + EXTERNAL_SUFFIX)
    beside.unlink(missing_ok=True)  # onnx would append to it
    if model.ByteSize() >= EXTERNAL_BYTES:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= EXTERNAL_TENSOR_BYTES:
                set_external_data(tensor, beside.name)
    onnx.save(model, str(path))
    if beside.exists():
        beside.chmod(path.stat().st_mode)  # onnx makes it private to its owner


def count_nodes(path: Path) -> Counter[str]:
    """How many nodes of each operator the model has."""
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' warnings and prints, which are about themselves, away from our users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _load(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model in PyTorch; GraphError if it does not fit into one ONNX file."""
    model = load_model(checkpoint)
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if size_bytes > MAX_BYTES:
        raise GraphError(
            f"{checkpoint.name} has {size_bytes / 1e9:.1f} GB of float32 weights; models up to 2 GiB can be exported"
        )
    return model


def _shape(model: PreTrainedModel) -> dict[str, int]:
    return {
        "layers": int(model.config.num_hidden_layers),
        "heads": int(model.config.num_attention_heads),
        "hidden_size": int(model.config.hidden_size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _export_with_optimum(checkpoint: Checkpoint, path: Path) -> dict[str, int]:
    """Write the unfused graph, and return the model's shape. The model is freed on return: fusing needs the memory."""
    import optimum.exporters.onnx.model_configs  # noqa: F401  (registers the architectures)
    from optimum.exporters.onnx.convert import export
    from optimum.exporters.tasks import TasksManager

    model = _load(checkpoint)
    try:
        with quiet():
            make_config = TasksManager.get_exporter_config_constructor(
                "onnx", model, task="text-classification", library_name="transformers"
            )
            export(model, make_config(model.config), path, opset=OPSET)
    except Exception as error:  # optimum, torch and onnx raise whatever they like
        kind = checkpoint.config["model_type"]
        raise GraphError(f"optimum cannot export {checkpoint.name} (model type {kind}): {error}") from error
    return _shape(model)


def _fuse(source: Path, out: Path, *, heads: int, hidden_size: int) -> dict[str, int]:
    """Fuse for ONNX Runtime's CPU and CUDA providers (both have these operators); returns the counts of fused nodes."""
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
