"""Write the graph for CPUs of a DeBERTa-v2 or v3: nothing is computed for padding.

Real tokens stand one after the other, and the last layer is computed for the first token of each pair alone, as in
`bert_cpu.py`. Attention is disentangled: to a query's product with a key come its product with a key for their
distance, and the key's product with a query for it. Those keys and queries of distances depend on no input: they are
computed here, once for each layer, and stay in float32 in every precision. Which distance has which of them is one
table for all layers, made by transformers' own code: beyond half of the buckets, several distances share one.

Convolutions (DeBERTa-v2-xlarge) and embeddings of another size are left to optimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from cappy_export.graphs.operators import DOMAIN
from cappy_export.graphs.parts import Parts
from cappy_export.graphs.writer import ACTIVATIONS, GraphWriter, Tokens, Weights, find_tokens, kept

ROLES = {"c2p": "key", "p2c": "query"}
"""What a distance has, by the name of the product: a key for queries (content to position), a query for keys."""
_PARTS = ("weight", "bias")


def is_known(config: Mapping[str, Any]) -> bool:
    """Tell whether a DeBERTa's graph is written here: its activations are, and its distances count.

    >>> is_known({"relative_attention": True, "pos_att_type": ["p2c"], "conv_kernel_size": 3})
    False
    """
    activations = [config.get(key, "gelu") for key in ("hidden_act", "pooler_hidden_act")]
    head = config.get("attention_head_size")
    return (
        all(name in ACTIVATIONS for name in activations)
        and bool(config.get("relative_attention"))
        and bool(_kinds(config.get("pos_att_type")))
        and not config.get("conv_kernel_size")
        and "embedding_size" not in config
        and (not head or head * config.get("num_attention_heads", 0) == config.get("hidden_size"))
    )


def encoder_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """Write the float32 model of a transformers `config` and `weights` (named as in PyTorch).

    >>> encoder_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})

    Inputs `input_ids`, `attention_mask` and, where types have embeddings, `token_type_ids`, (batch, length) int64,
    padded on the right; output `logits`, (batch, 1). Pairs have at most `max_position_embeddings` tokens.
    """
    graph = GraphWriter()
    encoder = _Encoder(graph, Parts(graph, config, weights, prefix="deberta"))
    tokens = find_tokens(graph)
    hidden = encoder.embed(tokens)
    for number in range(config.num_hidden_layers):
        hidden = encoder.layer(number, hidden, tokens, is_last=number == config.num_hidden_layers - 1)
    encoder.head(hidden)
    types = ["token_type_ids"] if config.type_vocab_size > 0 else []
    return graph.model(config.model_type, ["input_ids", "attention_mask", *types])


def distance_rows(config: Any) -> npt.NDArray[np.int64]:
    """Number the rows of the distances' embeddings: entry m + j - i is for query i and key j, of at most m tokens.

    >>> distance_rows(model.config).shape
    (1025,)
    """
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    longest, span = int(config.max_position_embeddings), _span(config)
    buckets = getattr(config, "position_buckets", -1)
    differences = torch.arange(longest, -longest - 1, -1)  # of i - j
    if buckets > 0:
        differences = make_log_bucket_position(differences, buckets, _most_distant(config)).long()
    rows: npt.NDArray[np.int64] = (differences + span).clamp(0, 2 * span - 1).numpy()
    return rows


def _kinds(told: str | Sequence[str] | None) -> set[str]:
    """Read `pos_att_type`, a list or a text such as "p2c|c2p"."""
    names = told.lower().split("|") if isinstance(told, str) else told or []
    return {name.strip() for name in names} & ROLES.keys()


def _most_distant(config: Any) -> int:
    told = getattr(config, "max_relative_positions", -1)
    return int(config.max_position_embeddings if told < 1 else told)


def _span(config: Any) -> int:
    """Count the distances to one side that have embeddings."""
    buckets = getattr(config, "position_buckets", -1)
    return int(buckets if buckets > 0 else _most_distant(config))


class _Encoder:
    def __init__(self, graph: GraphWriter, parts: Parts) -> None:
        self._graph = graph
        self._parts = parts
        self._config = config = parts.config
        self._kinds = _kinds(config.pos_att_type)
        self._heads = config.num_attention_heads
        self._head_size = config.hidden_size // config.num_attention_heads
        self._distances = self._embed_distances()
        self._distance_rows = graph.constant("distance_rows", distance_rows(config))

    def embed(self, tokens: Tokens) -> str:
        """Look up, sum and normalise the embeddings of the real tokens: (tokens, hidden)."""
        graph, parts, config = self._graph, self._parts, self._config
        total = parts.rows("word_embeddings", kept(graph, "input_ids", tokens))
        if config.position_biased_input:
            places = graph.add("Gather", [tokens.places, graph.constant("one", 1)], "places_in_pairs", axis=1)
            positions = parts.rows("position_embeddings", places)
            total = graph.add("Add", [total, positions], "words_and_positions")
        if config.type_vocab_size > 0:
            types = parts.rows("token_type_embeddings", kept(graph, "token_type_ids", tokens))
            total = graph.add("Add", [total, types], "embeddings")
        return parts.norm("deberta.embeddings.LayerNorm", total)

    def layer(self, number: int, hidden: str, tokens: Tokens, *, is_last: bool) -> str:
        """Write a layer: (tokens, hidden) to the same; the last one to (batch, hidden), the first tokens only."""
        graph, parts = self._graph, self._parts
        prefix, name = f"deberta.encoder.layer.{number}", f"layer.{number}"
        read = graph.add("Gather", [hidden, tokens.starts], f"{name}/first_tokens") if is_last else hidden
        context = self._attention(number, (read, hidden), tokens, is_last=is_last)
        output = parts.linear(f"{prefix}.attention.output.dense", context, f"{name}/attention/output/dense")
        mixed = graph.add("Add", [output, read], f"{name}/attention/residual")
        middle = parts.norm(f"{prefix}.attention.output.LayerNorm", mixed)
        wide = parts.linear(f"{prefix}.intermediate.dense", middle, f"{name}/intermediate/dense")
        active = graph.activation(self._config.hidden_act, wide, f"{name}/intermediate/activation")
        narrow = parts.linear(f"{prefix}.output.dense", active, f"{name}/output/dense")
        return parts.norm(f"{prefix}.output.LayerNorm", graph.add("Add", [narrow, middle], f"{name}/output/residual"))

    def head(self, first: str) -> None:
        """Write the head: logits (batch, 1) of the first tokens (batch, hidden)."""
        dense = self._parts.linear("pooler.dense", first, "head/dense")
        active = self._graph.activation(self._config.pooler_hidden_act, dense, "head/activation")
        self._parts.linear("classifier", active, "logits")

    def _attention(self, number: int, sources: tuple[str, str], tokens: Tokens, *, is_last: bool) -> str:
        """Attend within each pair: (tokens, hidden); in the last layer the first tokens only, (batch, hidden)."""
        read, hidden = sources
        weights, name = f"deberta.encoder.layer.{number}.attention.self", f"layer.{number}/attention"
        shared = [tokens.lengths, *(self._of_distances(weights, kind) for kind in ROLES), self._distance_rows]
        scale = 1 / sqrt(self._head_size * (1 + len(self._kinds)))
        attributes: dict[str, Any] = {"domain": DOMAIN, "heads": self._heads, "scale": scale}
        if not is_last:
            packed = self._projections(weights, ("query", "key", "value"), hidden, name)
            return self._graph.add("DisentangledAttention", [packed, *shared], name, **attributes)
        query = self._projections(weights, ("query",), read, name)
        packed = self._projections(weights, ("key", "value"), hidden, name)
        return self._graph.add("FirstDisentangledAttention", [query, packed, *shared], name, **attributes)

    def _projections(self, weights: str, roles: Sequence[str], hidden: str, name: str) -> str:
        role, parts = "_".join(roles), [f"{weights}.{part}_proj" for part in roles]
        return self._parts.projections(parts, hidden, f"{weights}.{role}", f"{name}/{role}")

    def _embed_distances(self) -> torch.Tensor:
        """Look up and normalise the embeddings of distances: (2 span, hidden)."""
        rows = torch.from_numpy(self._parts.weight("deberta.encoder.rel_embeddings.weight")[: 2 * _span(self._config)])
        kinds = getattr(self._config, "norm_rel_ebd", "none").lower().split("|")
        if "layer_norm" not in [kind.strip() for kind in kinds]:
            return rows
        scale, shift = (torch.from_numpy(self._parts.weight(f"deberta.encoder.LayerNorm.{part}")) for part in _PARTS)
        return torch.nn.functional.layer_norm(rows, scale.shape, scale, shift, float(self._config.layer_norm_eps))

    def _of_distances(self, weights: str, kind: str) -> str:
        """Add a layer's keys or queries of distances, (heads, 2 span, head size): zeros where they do not count."""
        role = ROLES[kind]
        if kind not in self._kinds:
            shape = self._heads, len(self._distances), self._head_size
            return self._graph.constant("no_distances", np.zeros(shape, np.float32))
        shared = f"{role}_proj" if getattr(self._config, "share_att_key", False) else f"pos_{role}_proj"
        matrix, bias = (torch.from_numpy(self._parts.weight(f"{weights}.{shared}.{part}")) for part in _PARTS)
        table = torch.nn.functional.linear(self._distances, matrix, bias)
        by_head = table.reshape(len(table), self._heads, self._head_size).transpose(0, 1)
        return self._graph.constant(f"{weights}.{role}.distances", by_head.numpy())
