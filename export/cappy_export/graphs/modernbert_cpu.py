"""Write the graph for CPUs of a ModernBERT: nothing is computed for padding.

Real tokens stand one after the other, as in `bert_cpu.py`. Layers normalise what they read, not what they give.
Attention turns queries and keys by their places in the pair. Every n-th layer attends to the whole pair, the others to
near tokens: an operator of `attention_operators.py` each. Feed-forward layers multiply one half of their inner values,
after the activation, by the other. Layers without biases get zeros, so that int8 is the same operator for all.

The head reads the mean of a pair's tokens, or its first token. The mean is attention by a query of zeros, which gives
each token the same weight; so a pair's mean is summed apart from its neighbours. Where it reads the first token, the
last layer computes queries, attention output and feed-forward for that token alone, as in `bert_cpu.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from cappy_export.graphs.operators import DOMAIN
from cappy_export.graphs.writer import ACTIVATIONS, GraphWriter, Tokens, Weights, find_tokens, kept


def is_known(config: Mapping[str, Any]) -> bool:
    """Tell whether a ModernBERT's graph is written here: its activations are.

    >>> is_known({"hidden_activation": "silu"})
    False
    """
    names = [config.get(key, "gelu") for key in ("hidden_activation", "classifier_activation")]
    return all(name in ACTIVATIONS for name in names) and config.get("rope_scaling") is None


def encoder_model(config: Any, weights: Weights) -> onnx.ModelProto:
    """Write the float32 model of a transformers `config` and `weights` (named as in PyTorch).

    >>> encoder_model(model.config, {name: value.numpy() for name, value in model.state_dict().items()})

    Inputs `input_ids` and `attention_mask`, (batch, length) int64, padded on the right; output `logits`, (batch, 1).
    """
    graph = GraphWriter()
    encoder = _Encoder(graph, config, {name: np.asarray(value, np.float32) for name, value in weights.items()})
    tokens = find_tokens(graph)
    hidden = encoder.embed(tokens)
    for number in range(config.num_hidden_layers):
        hidden = encoder.layer(number, hidden, tokens)
    encoder.head(encoder.norm("model.final_norm", hidden, "final_norm"), tokens)
    return graph.model(config.model_type, ["input_ids", "attention_mask"])


def rotations(config: Any, theta: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Compute cosines and sines of rotary positions: (positions, head size / 2) float32.

    >>> rotations(model.config, 10000.0)[0].shape
    (8192, 32)

    They are equal to those of transformers, bit by bit.
    """
    size = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    angles = torch.arange(config.max_position_embeddings).float()[:, None] * frequencies[None, :]
    return angles.cos().numpy(), angles.sin().numpy()


class _Encoder:
    def __init__(self, graph: GraphWriter, config: Any, weights: Weights) -> None:
        self._graph = graph
        self._config = config
        self._weights = weights

    def embed(self, tokens: Tokens) -> str:
        """Look up and normalise the words of the real tokens: (tokens, hidden)."""
        name = "model.embeddings.tok_embeddings.weight"
        ids = kept(self._graph, "input_ids", tokens)
        words = self._graph.add("Gather", [self._graph.constant(name, self._weights[name]), ids], "word_embeddings")
        return self.norm("model.embeddings.norm", words, "embeddings/norm")

    def layer(self, number: int, hidden: str, tokens: Tokens) -> str:
        """Write a layer: (tokens, hidden) to the same, or to (batch, hidden) if only first tokens are read."""
        graph, prefix, name = self._graph, f"model.layers.{number}", f"layer.{number}"
        read = self.norm(f"{prefix}.attn_norm", hidden, f"{name}/attention/norm") if number else hidden
        if self._is_of_first_tokens(number):
            context = self._attention_of_first(number, read, tokens)
            hidden = graph.add("Gather", [hidden, tokens.starts], f"{name}/first_tokens")
        else:
            context = self._attention(number, read, tokens)
        attended = self._linear(f"{prefix}.attn.Wo", context, f"{name}/attention/output/dense")
        middle = graph.add("Add", [hidden, attended], f"{name}/attention/residual")
        normed = self.norm(f"{prefix}.mlp_norm", middle, f"{name}/norm")
        wide = self._linear(f"{prefix}.mlp.Wi", normed, f"{name}/intermediate/dense")
        gated = self._gated(wide, f"{name}/intermediate")
        narrow = self._linear(f"{prefix}.mlp.Wo", gated, f"{name}/output/dense")
        return graph.add("Add", [middle, narrow], f"{name}/output/residual")

    def head(self, hidden: str, tokens: Tokens) -> None:
        """Write the head: logits (batch, 1)."""
        graph, config = self._graph, self._config
        is_of_first_tokens = self._is_of_first_tokens(config.num_hidden_layers - 1)
        pooled = hidden if is_of_first_tokens else graph.add("Gather", [hidden, tokens.starts], "first_tokens")
        if config.classifier_pooling == "mean":
            nothing = graph.add("Mul", [pooled, graph.constant("zero_float", 0.0)], "head/zeros")
            twice = graph.add("Concat", [hidden, hidden], "head/keys_and_values", axis=1)
            inputs, heads = [nothing, twice, tokens.lengths], config.num_attention_heads
            pooled = graph.add("FirstAttention", inputs, "head/mean", domain=DOMAIN, heads=heads)
        dense = self._linear("head.dense", pooled, "head/dense")
        active = graph.activation(config.classifier_activation, dense, "head/activation")
        self._linear("classifier", self.norm("head.norm", active, "head/norm"), "logits")

    def norm(self, weights: str, hidden: str, name: str) -> str:
        """Write a layer normalisation, with a shift of zeros where it has none."""
        scale = self._graph.constant(f"{weights}.weight", self._weights[f"{weights}.weight"])
        inputs = [hidden, scale, self._bias(weights)]
        return self._graph.add("LayerNormalization", inputs, name, axis=-1, epsilon=float(self._config.norm_eps))

    def _attention(self, number: int, hidden: str, tokens: Tokens) -> str:
        """Attend within each pair, to all tokens or to near ones: (tokens, hidden)."""
        graph, config, name = self._graph, self._config, f"layer.{number}/attention"
        packed = self._linear(f"model.layers.{number}.attn.Wqkv", hidden, f"{name}/query_key_value")
        inputs, heads = [packed, tokens.lengths, *self._angles(number)], config.num_attention_heads
        if not self._is_local(number):
            return graph.add("RotaryAttention", inputs, name, domain=DOMAIN, heads=heads)
        window = config.local_attention // 2
        return graph.add("LocalRotaryAttention", inputs, name, domain=DOMAIN, heads=heads, window=window)

    def _attention_of_first(self, number: int, hidden: str, tokens: Tokens) -> str:
        """Attend from each pair's first token: (batch, hidden)."""
        graph, name, size = self._graph, f"layer.{number}/attention", self._config.hidden_size
        weights = f"model.layers.{number}.attn.Wqkv"
        first = graph.add("Gather", [hidden, tokens.starts], f"{name}/first_tokens")
        query = self._linear(weights, first, f"{name}/query", rows=slice(0, size))
        packed = self._linear(weights, hidden, f"{name}/key_value", rows=slice(size, 3 * size))
        inputs, heads = [query, packed, tokens.lengths, *self._angles(number)], self._config.num_attention_heads
        return graph.add("FirstRotaryAttention", inputs, name, domain=DOMAIN, heads=heads)

    def _angles(self, number: int) -> list[str]:
        """Add the cosines and sines of a layer's rotary positions, which many layers share."""
        graph, config = self._graph, self._config
        local_theta = config.global_rope_theta if config.local_rope_theta is None else config.local_rope_theta
        theta = local_theta if self._is_local(number) else config.global_rope_theta
        tables = [f"rotations.{theta}.{part}" for part in ("cos", "sin")]
        if tables[0] not in graph.constants:
            for table, values in zip(tables, rotations(config, theta), strict=True):
                graph.constant(table, values)
        return tables

    def _gated(self, wide: str, name: str) -> str:
        """Multiply one half of the inner values, after the activation, by the other."""
        graph, activation, size = self._graph, self._config.hidden_activation, self._config.intermediate_size
        if activation == "gelu":
            return graph.add("GeGlu", [wide], f"{name}/gated", domain=DOMAIN)
        halves = [f"{name}/gate", f"{name}/value"]
        sizes = graph.constant("halves", [size, size])
        graph.add_all("Split", [wide, sizes], halves, f"{name}/halves", domain="", axis=1)
        active = graph.activation(activation, halves[0], f"{name}/activation")
        return graph.add("Mul", [active, halves[1]], f"{name}/gated")

    def _is_local(self, number: int) -> bool:
        return bool(number % self._config.global_attn_every_n_layers != 0)

    def _is_of_first_tokens(self, number: int) -> bool:
        """Tell whether only first tokens are read of a layer: it is the last, they are pooled, and they see all."""
        is_last = number == self._config.num_hidden_layers - 1
        return is_last and self._config.classifier_pooling == "cls" and not self._is_local(number)

    def _linear(self, weights: str, hidden: str, name: str, *, rows: slice = slice(None)) -> str:
        """Write a linear layer, or the one that gives some `rows` of its outputs."""
        matrix = self._weights[f"{weights}.weight"][rows].T
        part = "" if rows == slice(None) else f".{rows.start}"
        bias = self._bias(weights, rows)
        return self._graph.add("Gemm", [hidden, self._graph.constant(f"{weights}{part}.matrix", matrix), bias], name)

    def _bias(self, weights: str, rows: slice = slice(None)) -> str:
        """Add the bias of a linear layer or a norm: zeros, shared by all of one size, where it has none."""
        part = "" if rows == slice(None) else f".{rows.start}"
        if f"{weights}.bias" in self._weights:
            return self._graph.constant(f"{weights}{part}.bias", self._weights[f"{weights}.bias"][rows])
        size = len(self._weights[f"{weights}.weight"][rows])
        return self._graph.constant(f"zeros.{size}", np.zeros(size, np.float32))
