"""Write the graph for CPUs of a BERT, RoBERTa or ELECTRA encoder: nothing is computed for padding.

`input_ids` and `attention_mask` come padded, (batch, length), as every tool gives them. The graph first takes the real
tokens out, one after the other: (tokens, hidden). Embeddings, projections, feed-forward layers and layer norms run on
those. Attention runs pair by pair, at the pair's own length and without a mask: an operator of
`attention_operators.py`. So a pair alone and in any company goes through the same operations on the same numbers. In
the last layer only the first token of a pair is read. Queries, attention output and feed-forward are computed for that
token alone, which is exact.

Residuals are Add and LayerNormalization: ONNX Runtime 1.32's SkipLayerNormalization takes 5 to 6 times as long as the
three operators that it replaces (it is not vectorised; measured by hand).

Knows nothing of quantisation or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from cappy_export.graphs.operators import DOMAIN
from cappy_export.graphs.parts import BertParts
from cappy_export.graphs.writer import GraphWriter, Tokens, Weights, find_tokens, kept


def encoder_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """Write the float32 model of a transformers `config` and `weights` (named as in PyTorch).

    >>> encoder_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})

    Inputs `input_ids`, `attention_mask` and, for BERT and ELECTRA, `token_type_ids`, (batch, length) int64, each row
    with one token or more that is not masked; output `logits`, (batch, 1) float32.
    """
    graph = GraphWriter()
    parts = BertParts(graph, config, weights)
    encoder = _Encoder(graph, parts)
    tokens = find_tokens(graph)
    hidden = encoder.embed(tokens)
    for layer in range(config.num_hidden_layers):
        hidden = encoder.layer(layer, hidden, tokens, is_last=layer == config.num_hidden_layers - 1)
    parts.head(hidden)
    return graph.model(config.model_type, [name for name in parts.inputs if name != "position_ids"])


class _Encoder:
    def __init__(self, graph: GraphWriter, parts: BertParts) -> None:
        self._graph = graph
        self._parts = parts
        self._config = parts.config

    def embed(self, tokens: Tokens) -> str:
        """Look up the embeddings of the real tokens: (tokens, hidden); ELECTRA's may have another size before."""
        graph, parts = self._graph, self._parts
        words = parts.rows("word_embeddings", kept(graph, "input_ids", tokens))
        positions = parts.rows("position_embeddings", kept(graph, self._positions(), tokens))
        types = parts.types() or parts.rows("token_type_embeddings", kept(graph, "token_type_ids", tokens))
        total = graph.add("Add", [graph.add("Add", [words, types], "words_and_types"), positions], "embeddings")
        normed = parts.norm(f"{parts.prefix}.embeddings.LayerNorm", total)
        if getattr(self._config, "embedding_size", self._config.hidden_size) == self._config.hidden_size:
            return normed
        return parts.linear(f"{parts.prefix}.embeddings_project", normed, "embeddings/project")

    def layer(self, number: int, hidden: str, tokens: Tokens, *, is_last: bool) -> str:
        """Write a layer: (tokens, hidden) to the same; the last one to (batch, hidden), the first tokens only."""
        graph, parts, prefix = self._graph, self._parts, f"{self._parts.prefix}.encoder.layer.{number}"
        attended, name = f"{prefix}.attention", f"layer.{number}"
        read = graph.add("Gather", [hidden, tokens.starts], f"{name}/first_tokens") if is_last else hidden
        context = self._attention(name, f"{attended}.self", (read, hidden), tokens, is_last=is_last)
        output = parts.linear(f"{attended}.output.dense", context, f"{name}/attention/output/dense")
        mixed = graph.add("Add", [output, read], f"{name}/attention/residual")
        middle = parts.norm(f"{attended}.output.LayerNorm", mixed)
        wide = parts.linear(f"{prefix}.intermediate.dense", middle, f"{name}/intermediate/dense")
        active = graph.activation(self._config.hidden_act, wide, f"{name}/intermediate/activation")
        narrow = parts.linear(f"{prefix}.output.dense", active, f"{name}/output/dense")
        return parts.norm(f"{prefix}.output.LayerNorm", graph.add("Add", [narrow, middle], f"{name}/output/residual"))

    def _attention(self, layer: str, weights: str, sources: tuple[str, str], tokens: Tokens, *, is_last: bool) -> str:
        """Attend within each pair: (tokens, hidden); in the last layer the first tokens only, (batch, hidden)."""
        read, hidden = sources
        heads, name = self._config.num_attention_heads, f"{layer}/attention"
        if not is_last:
            packed = self._projections(weights, ("query", "key", "value"), hidden, name)
            return self._graph.add("Attention", [packed, tokens.lengths], name, domain=DOMAIN, heads=heads)
        query = self._projections(weights, ("query",), read, name)
        packed = self._projections(weights, ("key", "value"), hidden, name)
        return self._graph.add("FirstAttention", [query, packed, tokens.lengths], name, domain=DOMAIN, heads=heads)

    def _projections(self, weights: str, roles: Sequence[str], hidden: str, name: str) -> str:
        role, parts = "_".join(roles), [f"{weights}.{part}" for part in roles]
        return self._parts.projections(parts, hidden, f"{weights}.{role}", f"{name}/{role}")

    def _positions(self) -> str:
        """Count position ids (batch, length) as transformers does; (1, length) where only the place counts."""
        graph, constant = self._graph, self._graph.constant
        if self._parts.counts_from_padding:
            padding = constant("padding", self._config.pad_token_id)
            is_text = graph.add("Not", [graph.add("Equal", ["input_ids", padding], "is_padding")], "is_text")
            counted = graph.add("Cast", [is_text], "counted", to=TensorProto.INT64)
            running = graph.add("CumSum", [counted, constant("one", 1)], "running")
            return graph.add("Add", [graph.add("Mul", [running, counted], "numbered"), padding], "positions")
        every = graph.add("ConstantOfShape", [graph.add("Shape", ["input_ids"], "shape")], "every", value=_ONE)
        running = graph.add("CumSum", [every, constant("one", 1)], "running")
        return graph.add("Sub", [running, constant("one", 1)], "positions")


_ONE = helper.make_tensor("one", TensorProto.INT64, [1], [1])
