"""Put an encoder's weights into a graph, and write the pieces that many graphs share.

Knows the layout of the weights in transformers' models; knows nothing of attention, quantisation or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from cappy_export.checkpoints.config import COUNTS_FROM_PADDING
from cappy_export.graphs.writer import ACTIVATIONS, ROBERTAS, GraphWriter, Weights

TANH, GELU = ("Tanh", ""), ACTIVATIONS["gelu"]


@dataclass(frozen=True)
class Layout:
    """Name a model's weights: the encoder's `prefix`, the head's two layers, and the `activation` between these."""

    prefix: str
    dense: str
    activation: tuple[str, str]
    out: str


LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(ROBERTAS, Layout("roberta", "classifier.dense", TANH, "classifier.out_proj")),
    "bert": Layout("bert", "bert.pooler.dense", TANH, "classifier"),
    "electra": Layout("electra", "classifier.dense", GELU, "classifier.out_proj"),
}
"""The model types that `bert_cpu.py` writes."""


class Parts:
    """Write linear layers, layer norms and embeddings with the weights of a transformers model.

    >>> parts = Parts(GraphWriter(), model.config, weights, prefix="deberta")
    """

    def __init__(self, graph: GraphWriter, config: Any, weights: Weights, *, prefix: str) -> None:
        """Take `weights` by their names in PyTorch, the encoder's with `prefix`, and transformers' `config`."""
        self._graph = graph
        self._weights = {name: np.asarray(value, np.float32) for name, value in weights.items()}
        self.config = config
        self.prefix = prefix

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """Look up a weight by its name in PyTorch."""
        return self._weights[name]

    def rows(self, table: str, ids: str) -> str:
        """Look up the rows `ids` of the embeddings `table` ("word_embeddings")."""
        name = f"{self.prefix}.embeddings.{table}"
        return self._graph.add(
            "Gather", [self._graph.constant(f"{name}.weight", self._weights[f"{name}.weight"]), ids], name
        )

    def matrix(self, name: str) -> str:
        """Add the weights of a linear layer, (inputs, outputs)."""
        return self._graph.constant(f"{name}.matrix", self._weights[f"{name}.weight"].T)

    def bias(self, name: str) -> str:
        """Add the bias of a linear layer, (outputs,)."""
        return self._graph.constant(f"{name}.bias", self._weights[f"{name}.bias"])

    def linear(self, weights: str, hidden: str, name: str) -> str:
        """Add a linear layer on (rows, inputs)."""
        return self._graph.add("Gemm", [hidden, self.matrix(weights), self.bias(weights)], name)

    def projections(self, weights: Sequence[str], hidden: str, matrix: str, name: str) -> str:
        """Project by several linear layers in one product, `matrix`: their weights and biases stand side by side."""
        matrices = [self._weights[f"{part}.weight"].T for part in weights]
        biases = [self._weights[f"{part}.bias"] for part in weights]
        inputs = [
            hidden,
            self._graph.constant(f"{matrix}.matrix", np.concatenate(matrices, axis=1)),
            self._graph.constant(f"{matrix}.bias", np.concatenate(biases)),
        ]
        return self._graph.add("Gemm", inputs, name)

    def norm(self, weights: str, hidden: str, *, move: npt.NDArray[np.float64] | float = 0.0) -> str:
        """Add a layer normalisation over the last axis."""
        names = self.norm_weights(weights, move=move)
        return self._graph.add("LayerNormalization", [hidden, *names], weights, axis=-1, epsilon=self.epsilon)

    def norm_weights(self, name: str, *, move: npt.NDArray[np.float64] | float = 0.0) -> list[str]:
        """Add scale and shift of a layer normalisation, and return their names. `move` is added to the shift."""
        scale, shift = (self._weights[f"{name}.{part}"] for part in ("weight", "bias"))
        return [self._graph.constant(f"{name}.weight", scale), self._graph.constant(f"{name}.bias", shift + move)]

    @property
    def epsilon(self) -> float:
        """Give the epsilon of all layer normalisations."""
        return float(self.config.layer_norm_eps)


class BertParts(Parts):
    """Write what BERT, RoBERTa and ELECTRA have beside layers: embeddings, inputs and the head.

    >>> parts = BertParts(GraphWriter(), model.config, weights)
    >>> parts.inputs
    ['input_ids', 'attention_mask', 'position_ids']
    """

    def __init__(self, graph: GraphWriter, config: Any, weights: Weights) -> None:
        super().__init__(graph, config, weights, prefix=LAYOUTS[config.model_type].prefix)
        self.counts_from_padding = config.model_type in COUNTS_FROM_PADDING
        others = ["position_ids"] if self.counts_from_padding else ["token_type_ids"]
        self.inputs = ["input_ids", "attention_mask", *others]

    def types(self) -> str | None:
        """Add the row of the only token type; None where there are several, to look up by `rows`."""
        if not self.counts_from_padding:
            return None
        name = f"{self.prefix}.embeddings.token_type_embeddings"
        return self._graph.constant(f"{name}.row", self._weights[f"{name}.weight"][0])

    def padded_embeddings(self) -> str:
        """Sum words, types and positions, padding included: (batch, length, hidden).

        `position_ids` is an input where they depend on the tokens: GPUs are slow to count, and TensorRT cannot.
        """
        graph, words = self._graph, self.rows("word_embeddings", "input_ids")
        types = self.types() or self.rows("token_type_embeddings", "token_type_ids")
        if self.counts_from_padding:
            positions = self.rows("position_embeddings", "position_ids")
        else:
            # Counted in float: TensorRT counts nothing else, and it sees the shape in this, but not in a Slice.
            # Counted from the mask: ids may be too large for fp16.
            mask = graph.add("Cast", ["attention_mask"], "mask_as_float", to=TensorProto.FLOAT)
            zeros = graph.add("Mul", [mask, graph.constant("zero_float", 0.0)], "zeros")
            ones = graph.add("Add", [zeros, graph.constant("one_float", 1.0)], "ones")
            running = graph.add("CumSum", [ones, graph.constant("axis_1", 1)], "running")
            places = graph.add("Sub", [running, graph.constant("one_float", 1.0)], "places_float")
            positions = self.rows("position_embeddings", graph.add("Cast", [places], "places", to=TensorProto.INT64))
        return graph.add("Add", [graph.add("Add", [words, types], "words_and_types"), positions], "embeddings")

    def head(self, first: str) -> None:
        """Add the head: logits (batch, 1) of the first tokens (batch, hidden)."""
        layout = LAYOUTS[self.config.model_type]
        operator, domain = layout.activation
        wide = self.linear(layout.dense, first, "head/dense")
        self.linear(layout.out, self._graph.add(operator, [wide], "head/activation", domain=domain), "logits")
