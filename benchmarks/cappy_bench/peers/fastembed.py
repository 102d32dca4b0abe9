"""Scores with fastembed's TextCrossEncoder on optimum's export at O2, a custom model; raw logits.

It has no export of its own, and its users do not have our bundle's graph.

It leaves batching to its user, except for the number of pairs: `rerank_pairs` takes them in input order and pads each
batch to its longest pair. Unsorted, the smallest batch is the best: 64 pairs of cappy-mini took 1.19 s in batches of 1,
1.49 in 2, 1.64 in 4, 2.06 in 8; its default is 64. It tokenises pairs with the bundle's own tokenizer.json, and cuts
them to the `model_max_length` of tokenizer_config.json.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastembed.common.model_description import ModelSource
from fastembed.rerank.cross_encoder import TextCrossEncoder

from cappy_bench.peers import optimum_onnx
from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.worker import serve

BATCH = 1
NAME = "benchmarked"


class CountedSession:
    """An ONNX Runtime session, as fastembed uses it, that counts the tokens it is given."""

    def __init__(self, session: Any) -> None:
        self.get_inputs = session.get_inputs
        self.tokens = 0
        self._session = session

    def run(self, output_names: Any, inputs: dict[str, Any]) -> Any:
        self.tokens += inputs["input_ids"].size
        return self._session.run(output_names, inputs)


class TextCrossEncoderRunner:
    """`TextCrossEncoder.rerank_pairs`, with the tokens of every run counted at its session."""

    def __init__(self, encoder: TextCrossEncoder) -> None:
        self._encoder = encoder
        self._session = encoder.model.model = CountedSession(encoder.model.model)

    @property
    def computed_tokens(self) -> int:
        """Tokens computed so far, padding included."""
        return self._session.tokens

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        return np.fromiter(self._encoder.rerank_pairs(list(pairs), batch_size=BATCH), dtype=np.float32)

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [
            [token for token, kept in zip(found.ids, found.attention_mask, strict=True) if kept]
            for found in self._encoder.model.tokenize(list(pairs))
        ]


def prepare(model: Model, precision: str) -> None:
    """Take the optimum runner's export, and the tokenizer of our bundle."""
    exported = dataclasses.replace(model, folder=model.folder.parent / "optimum_onnx")
    optimum_onnx.prepare(exported, precision)
    model.folder.mkdir(parents=True, exist_ok=True)
    link = model.folder / "model.onnx"
    link.unlink(missing_ok=True)
    link.hardlink_to(exported.folder / precision / optimum_onnx.FILES[precision])
    for path in model.bundle.glob("*.json"):
        shutil.copyfile(path, model.folder / path.name)


def open_runner(model: Model, precision: str) -> TextCrossEncoderRunner:
    """Open what `prepare` made; nothing is looked for outside of its folder."""
    TextCrossEncoder.add_custom_model(NAME, sources=ModelSource(url="unused"), model_file="model.onnx")
    encoder = TextCrossEncoder(
        NAME,
        cache_dir=str(model.folder),
        threads=model.threads,
        providers=["CPUExecutionProvider"],
        specific_model_path=str(model.folder),
    )
    return TextCrossEncoderRunner(encoder)


if __name__ == "__main__":
    serve(open_runner, prepare)
