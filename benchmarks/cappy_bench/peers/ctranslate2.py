"""Scores with CTranslate2's Encoder, from its TransformersConverter, and with the scoring head in numpy.

CTranslate2 has no sequence classification for RoBERTa, so the head (dense, tanh, out_proj on the first token's last
hidden state) is read from the checkpoint and kept in float32. Int8 is its `int8_float32`: linear layers and embeddings
with 8-bit weights, activations quantised token by token. Still a pair's score moves with its batch (by 0.007 on
cappy-mini, 0.06 at cappy-large's size).

On a CPU it takes padding out of a batch before the first layer (Padder in its src/layers/transformer.cc): apart from
the attention's own products it computes real tokens only. So `computed_tokens` counts real tokens, and no pair can be
made to cost a padded one. On an AMD CPU it multiplies with oneDNN; with MKL instead (CT2_USE_MKL=1) 64 pairs of
cappy-mini took 1.8 s for 1.5 s in fp32, and 3.4 s for 0.8 s in int8.

Its position ids count tokens from the left; RoBERTa's count only those that are not padding, so a text that holds a
literal `<pad>` scores differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from cappy_bench.peers.batches import Batched, Inputs
from cappy_bench.peers.conversions import convert_once
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve

COMPUTE_TYPES = {"fp32": "float32", "int8": "int8_float32"}

Floats = npt.NDArray[np.float32]
Head = Callable[[Floats], Scores]
"""first tokens' hidden states (batch, hidden) to scores (batch,)"""


def prepare(model: Model, precision: str) -> None:
    """Convert the checkpoint, with its weights stored as they will be computed."""
    convert_once(
        model.folder / precision,
        lambda folder: _convert(model.require_checkpoint(), folder, COMPUTE_TYPES[precision]),
        sources=[Path(__file__)],
    )


def open_runner(model: Model, precision: str) -> Batched:
    """Load what `prepare` made, and the head from the checkpoint."""
    encoder = ctranslate2.Encoder(
        str(model.folder / precision),
        device="cpu",
        intra_threads=model.threads,
        inter_threads=1,
        compute_type=COMPUTE_TYPES[precision],
    )
    config = json.loads((model.require_checkpoint() / "config.json").read_text(encoding="utf-8"))
    head = _load_head(model.require_checkpoint() / "model.safetensors")

    def run(inputs: Inputs) -> Scores:
        lengths = inputs["attention_mask"].sum(axis=1)
        output = encoder.forward_batch(_view(inputs["input_ids"]), _view(lengths))  # RoBERTa's types are all 0
        return head(np.asarray(output.last_hidden_state)[:, 0])  # only the first tokens are copied

    return Batched(model, run, pad_token_id=int(config["pad_token_id"]), is_padded=False)


def _load_head(path: Path) -> Head:
    """Read RobertaClassificationHead, in float32."""
    names = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    with safe_open(path, framework="numpy") as weights:
        dense, dense_bias, out, out_bias = (
            weights.get_tensor(f"classifier.{name}").astype(np.float32) for name in names
        )

    def head(states: Floats) -> Scores:
        scores: Scores = (np.tanh(states @ dense.T + dense_bias) @ out.T + out_bias)[:, 0]
        return scores

    return head


def _convert(checkpoint: Path, folder: Path, quantization: str) -> None:
    """Convert RobertaModel without its pooler.

    The pooler has no weights in the checkpoint, and scores do not use it. The converter is imported here: it imports
    PyTorch, 250 MB that the measured process must not carry.
    """
    from ctranslate2.converters import TransformersConverter

    class EncoderConverter(TransformersConverter):  # type: ignore[misc]
        def load_model(self, model_class: Any, model_name_or_path: str, *, dtype: Any, config: Any) -> Any:
            return model_class.from_pretrained(model_name_or_path, add_pooling_layer=False, dtype=dtype, config=config)

    EncoderConverter(str(checkpoint)).convert(str(folder), quantization=quantization)


def _view(values: npt.NDArray[np.int64]) -> ctranslate2.StorageView:
    """The int32 array that CTranslate2 reads, kept alive by the view."""
    return ctranslate2.StorageView.from_array(np.ascontiguousarray(values, dtype=np.int32))


if __name__ == "__main__":
    serve(open_runner, prepare)
