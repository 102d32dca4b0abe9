"""Write the graph for CUDA: ONNX Runtime's fused operators, and nothing computed for padding.

`RemovePadding` takes the real tokens out of the padded embeddings: (tokens, hidden). Everything after it runs on those;
`PackedMultiHeadAttention` knows from the offsets where each pair begins and ends. As on the CPU, the last layer
computes only the first token of each pair. Both operators exist for CUDA alone (onnxruntime/contrib_ops/cuda/bert), so
`stand_ins.py` gives the CPU functions with which this graph is proven.

Queries, keys and values come apart, and the attention has no bias: only then does it read them where they are, with
FlashAttention-2 in fp16 from compute capability 8.0 on. None of the three biases is added. The softmax does not change
if a query's scores all grow by the same, which is all that the keys' bias does; and shares add up to 1, so the values'
bias is a constant behind the attention, and goes into the bias of its output. The queries' bias goes into their
weights: layer normalisation leaves a sum that is the same for every token, from which a constant can be made
(`find_entry`). As a bias of its own it was copied into every row first, 8% of a batch's time on an H200.
`PackedAttention`, one operator with the projections in it, has no FlashAttention, and in fp32 keeps all scores.

The operators count on pairs that are padded on the right, as the engine pads them: of the mask they are told each
pair's number of tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from cappy_export.graphs.parts import BertParts
from cappy_export.graphs.writer import MICROSOFT, GraphWriter, Weights

LEAST_SUM = 1 / 8
"""How much a token's values, each over its scale, must add up to, per value. Less would be lost in fp16's rounding."""
MOST_NOISE = 1e-3
"""How much of a bias may be lost to rounding before it is added as a bias. fp16 itself rounds to 0.0005."""
HALF_ROUNDING, HALF_SMALLEST = 2.0**-12, 2.0**-25
"""How far fp16 rounds a number of 1, and one near 0."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """How tokens enter a layer: moved by `move`, (hidden,), such that each one's product with `row`, (hidden,), is 1.

    Where there is no such row, `row` is None and `move` is 0.
    """

    move: Floats
    row: Floats | None


def find_entry(scale: npt.NDArray[np.float32], shift: npt.NDArray[np.float32]) -> Entry:
    """Find a row whose product with every token is 1.

    The tokens come from a layer normalisation of this `scale` and `shift`. A token is `z * scale + shift`, and its z
    add up to 0. So its values, each over its scale, add up to the sum of `shift / scale`, whatever the token. Where
    that sum is near 0, the tokens are moved first.

        >>> entry = find_entry(np.array([1, 2], np.float32), np.array([3, 2], np.float32))
        >>> token = np.array([0.5, -0.5]) * [1, 2] + [3, 2]
        >>> (token + entry.move) @ entry.row
        1.0
    """
    none = Entry(np.zeros(len(scale)), None)
    if not scale.all():
        return none
    wide = scale.astype(np.float64)
    ratios = shift / wide
    step = math.copysign(LEAST_SUM, ratios.sum()) if abs(ratios.sum()) < LEAST_SUM * len(scale) else 0.0
    ratios += step
    total = float(ratios.sum())
    rounding = HALF_ROUNDING * np.sqrt(1 + ratios**2) + HALF_SMALLEST / np.abs(wide)
    noise = math.sqrt(np.sum(rounding**2)) / abs(total)
    return Entry(step * wide, 1 / (wide * total)) if noise < MOST_NOISE else none


def packed_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """Write the float32 model of a transformers `config` and `weights` (named as in PyTorch).

    >>> packed_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})

    Inputs `input_ids`, `attention_mask` (padded on the right) and `position_ids`, for BERT `token_type_ids`, (batch,
    length) int64; output `logits`, (batch, 1) float32.
    """
    graph = GraphWriter()
    parts = BertParts(graph, config, weights)
    entries = _entries(parts)
    hidden, offsets, bounds = _tokens(graph, parts, entries[0])
    starts = graph.add(
        "Slice", [bounds, *(graph.constant(f"slice_{name}", [value]) for name, value in _ALL_BUT_LAST)], "starts"
    )
    for number in range(config.num_hidden_layers):
        is_last = number == config.num_hidden_layers - 1
        hidden = _layer(graph, parts, number, hidden, (offsets, bounds), entries, starts if is_last else None)
    parts.head(hidden)
    return graph.model(config.model_type, parts.inputs)


_ALL_BUT_LAST = (("from", 0), ("to", -1), ("axis", 0))


def packing_counts(layers: int, *, has_gelu: bool) -> dict[str, int]:
    """Count the nodes of each fused kind that a packed graph has.

    >>> packing_counts(2, has_gelu=False)
    {'RemovePadding': 1, 'PackedMultiHeadAttention': 2, 'SkipLayerNormalization': 4}
    """
    counts = {"RemovePadding": 1, "PackedMultiHeadAttention": layers, "SkipLayerNormalization": 2 * layers}
    return {**counts, "BiasGelu": layers} if has_gelu else counts


def _entries(parts: BertParts) -> list[Entry]:
    """Find how tokens enter every layer, and leave the last one: as they are."""
    norms = ["embeddings", *(f"encoder.layer.{number}.output" for number in range(parts.config.num_hidden_layers))]
    found = [
        find_entry(*(parts.weight(f"{parts.prefix}.{norm}.LayerNorm.{part}") for part in ("weight", "bias")))
        for norm in norms
    ]
    return [*found[:-1], Entry(np.zeros_like(found[-1].move), None)]


def _tokens(graph: GraphWriter, parts: BertParts, entry: Entry) -> tuple[str, str, str]:
    """Embed the real tokens (tokens, hidden); tell their offsets (batch, length) and bounds (batch + 1,)."""
    total = parts.padded_embeddings()
    counted = graph.add("Cast", ["attention_mask"], "mask_int32", to=TensorProto.INT32)
    counts = graph.add("ReduceSum", [counted, graph.constant("last_axis", [-1])], "token_counts", keepdims=0)
    names = ["embeddings/packed", "token_offsets", "bounds", "longest"]
    graph.add_all("RemovePadding", [total, counts], names, "remove_padding", domain=MICROSOFT)
    return parts.norm(f"{parts.prefix}.embeddings.LayerNorm", names[0], move=entry.move), names[1], names[2]


def _layer(
    graph: GraphWriter,
    parts: BertParts,
    number: int,
    hidden: str,
    packing: tuple[str, str],
    entries: Sequence[Entry],
    starts: str | None,
) -> str:
    """Write one layer: (tokens, hidden) to the same; with `starts` to (batch, hidden), those tokens only."""
    prefix, name = f"{parts.prefix}.encoder.layer.{number}", f"layer.{number}"
    entry, leaving = entries[number : number + 2]
    context = _attention(graph, parts, f"{prefix}.attention.self", hidden, packing, entry, f"{name}/attention")
    if starts is not None:
        context = graph.add("Gather", [context, starts], f"{name}/attention/first_tokens")
        hidden = graph.add("Gather", [hidden, starts], f"{name}/first_tokens")
    bias = _bias_behind_attention(graph, parts, f"{prefix}.attention", entry)
    middle = _residual(graph, parts, f"{prefix}.attention.output", context, hidden, bias, f"{name}/attention/output")
    wide = graph.add("MatMul", [middle, parts.matrix(f"{prefix}.intermediate.dense")], f"{name}/intermediate")
    bias = parts.bias(f"{prefix}.intermediate.dense")
    if parts.config.hidden_act == "gelu":
        active = graph.add("BiasGelu", [wide, bias], f"{name}/activation", domain=MICROSOFT)
    else:
        active = graph.add("Relu", [graph.add("Add", [wide, bias], f"{name}/intermediate/bias")], f"{name}/activation")
    bias = parts.bias(f"{prefix}.output.dense")
    return _residual(graph, parts, f"{prefix}.output", active, middle, bias, f"{name}/output", move=leaving.move)


def _attention(
    graph: GraphWriter, parts: BertParts, weights: str, hidden: str, packing: tuple[str, str], entry: Entry, name: str
) -> str:
    """Let the tokens of each pair attend to each other: (tokens, hidden) to the same."""
    if entry.row is None:
        query = parts.linear(f"{weights}.query", hidden, f"{name}/query")
    else:
        matrix = parts.weight(f"{weights}.query.weight").T
        bias = parts.weight(f"{weights}.query.bias") - entry.move @ matrix
        with_bias = graph.constant(f"{weights}.query.matrix", matrix + np.outer(entry.row, bias))
        query = graph.add("MatMul", [hidden, with_bias], f"{name}/query")
    key, value = (
        graph.add("MatMul", [hidden, parts.matrix(f"{weights}.{role}")], f"{name}/{role}") for role in ("key", "value")
    )
    return graph.add(
        "PackedMultiHeadAttention",
        [query, key, value, "", *packing],
        name,
        domain=MICROSOFT,
        num_heads=parts.config.num_attention_heads,
    )


def _bias_behind_attention(graph: GraphWriter, parts: BertParts, weights: str, entry: Entry) -> str:
    """Add the bias of attention's output. It includes the values' bias, and takes the tokens' move back."""
    output = parts.weight(f"{weights}.output.dense.weight").astype(np.float64)
    moved = parts.weight(f"{weights}.self.value.weight") @ entry.move
    values = parts.weight(f"{weights}.self.value.bias") - moved
    bias = parts.weight(f"{weights}.output.dense.bias") + output @ values - entry.move
    return graph.constant(f"{weights}.output.dense.bias", bias)


def _residual(
    graph: GraphWriter,
    parts: BertParts,
    weights: str,
    source: str,
    skip: str,
    bias: str,
    name: str,
    *,
    move: Floats | float = 0.0,
) -> str:
    """Write a linear layer; `bias`, residual (`skip`) and layer normalisation, moved, are one operator after it."""
    product = graph.add("MatMul", [source, parts.matrix(f"{weights}.dense")], name)
    norm = parts.norm_weights(f"{weights}.LayerNorm", move=move)
    return graph.add(
        "SkipLayerNormalization",
        [product, skip, *norm, bias],
        f"{name}/norm",
        domain=MICROSOFT,
        epsilon=parts.epsilon,
    )
