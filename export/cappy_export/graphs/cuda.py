"""Write the graph for CUDA: ONNX Runtime's fused operators, and nothing computed for padding.

`RemovePadding` takes the real tokens out of the padded embeddings: (tokens, hidden). Everything after it runs on those;
`PackedAttention` knows from the offsets where each pair begins and ends. As on the CPU, the last layer computes only
the first token of each pair. Both operators exist for CUDA alone (onnxruntime/contrib_ops/cuda/bert: remove_padding.cc,
packed_attention.cc), so `stand_ins.py` gives the CPU functions with which this graph is proven.

`PackedAttention` counts on pairs that are padded on the right, as the engine pads them: of the mask it is told each
pair's number of tokens only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from cappy_export.graphs.writer import MICROSOFT, GraphWriter, Parts, Weights


def packed_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """Write the float32 model of a transformers `config` and `weights` (named as in PyTorch).

    >>> packed_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})

    Inputs `input_ids`, `attention_mask` (padded on the right) and `position_ids`, for BERT `token_type_ids`, (batch,
    length) int64; output `logits`, (batch, 1) float32.
    """
    graph = GraphWriter()
    parts = Parts(graph, config, weights)
    hidden, offsets, bounds = _tokens(graph, parts)
    starts = graph.add(
        "Slice", [bounds, *(graph.constant(f"slice_{name}", [value]) for name, value in _ALL_BUT_LAST)], "starts"
    )
    for number in range(config.num_hidden_layers):
        is_last = number == config.num_hidden_layers - 1
        hidden = _layer(graph, parts, number, hidden, (offsets, bounds), starts if is_last else None)
    parts.head(hidden)
    return graph.model(config.model_type, parts.inputs)


_ALL_BUT_LAST = (("from", 0), ("to", -1), ("axis", 0))


def packing_counts(layers: int, *, has_gelu: bool) -> dict[str, int]:
    """Count the nodes of each fused kind that a packed graph has.

    >>> packing_counts(2, has_gelu=False)
    {'RemovePadding': 1, 'PackedAttention': 2, 'SkipLayerNormalization': 4}
    """
    counts = {"RemovePadding": 1, "PackedAttention": layers, "SkipLayerNormalization": 2 * layers}
    return {**counts, "BiasGelu": layers} if has_gelu else counts


def _tokens(graph: GraphWriter, parts: Parts) -> tuple[str, str, str]:
    """Embed the real tokens (tokens, hidden); tell their offsets (batch, length) and bounds (batch + 1,)."""
    total = parts.padded_embeddings()
    counted = graph.add("Cast", ["attention_mask"], "mask_int32", to=TensorProto.INT32)
    counts = graph.add("ReduceSum", [counted, graph.constant("last_axis", [-1])], "token_counts", keepdims=0)
    names = ["embeddings/packed", "token_offsets", "bounds", "longest"]
    graph.add_all("RemovePadding", [total, counts], names, "remove_padding", domain=MICROSOFT)
    return parts.norm(f"{parts.prefix}.embeddings.LayerNorm", names[0]), names[1], names[2]


def _layer(
    graph: GraphWriter, parts: Parts, number: int, hidden: str, packing: tuple[str, str], starts: str | None
) -> str:
    """Write one layer: (tokens, hidden) to the same; with `starts` to (batch, hidden), those tokens only."""
    prefix, name = f"{parts.prefix}.encoder.layer.{number}", f"layer.{number}"
    roles = [f"{prefix}.attention.self.{role}" for role in ("query", "key", "value")]
    matrices = np.concatenate([parts.weight(f"{role}.weight").T for role in roles], axis=1)
    biases = np.concatenate([parts.weight(f"{role}.bias") for role in roles])
    context = graph.add(
        "PackedAttention",
        [
            hidden,
            graph.constant(f"{prefix}.attention.self.matrix", matrices),
            graph.constant(f"{prefix}.attention.self.bias", biases),
            *packing,
        ],
        f"{name}/attention",
        domain=MICROSOFT,
        num_heads=parts.config.num_attention_heads,
    )
    if starts is not None:
        context = graph.add("Gather", [context, starts], f"{name}/attention/first_tokens")
        hidden = graph.add("Gather", [hidden, starts], f"{name}/first_tokens")
    middle = _residual(graph, parts, f"{prefix}.attention.output", context, hidden, f"{name}/attention/output")
    wide = graph.add("MatMul", [middle, parts.matrix(f"{prefix}.intermediate.dense")], f"{name}/intermediate")
    bias = parts.bias(f"{prefix}.intermediate.dense")
    if parts.config.hidden_act == "gelu":
        active = graph.add("BiasGelu", [wide, bias], f"{name}/activation", domain=MICROSOFT)
    else:
        active = graph.add("Relu", [graph.add("Add", [wide, bias], f"{name}/intermediate/bias")], f"{name}/activation")
    return _residual(graph, parts, f"{prefix}.output", active, middle, f"{name}/output")


def _residual(graph: GraphWriter, parts: Parts, weights: str, source: str, skip: str, name: str) -> str:
    """Write a linear layer; residual (`skip`) and layer normalisation are one operator after it."""
    product = graph.add("MatMul", [source, parts.matrix(f"{weights}.dense")], name)
    norm = parts.norm_weights(f"{weights}.LayerNorm")
    return graph.add(
        "SkipLayerNormalization",
        [product, skip, *norm, parts.bias(f"{weights}.dense")],
        f"{name}/norm",
        domain=MICROSOFT,
        epsilon=parts.epsilon,
    )
