"""Scores with llama.cpp, from its Python bindings, with its rank pooling: RoBERTa's head is part of its BERT.

The GGUF file is what its own converter makes of a RobertaForSequenceClassification, without a vocabulary: tokens come
from our tokenizer, since llama.cpp's own reads only the vocabularies that it knows. Matrices are in the precision of
the file, and vectors, positions and types in float32. Its GELU is the approximation by tanh, from a table in half
precision, so its scores are never exact, not even with a file in float32.

A batch is packed: pairs lie behind one another, and attention is computed between all of its tokens, with a mask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from cappy_bench.peers.batches import BATCH_TOKENS, Batched, Inputs
from cappy_bench.peers.conversions import convert_once
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve

Kind = gguf.GGMLQuantizationType
KINDS = {"fp16": Kind.F16, "bf16": Kind.BF16, "int8": Kind.Q8_0}
EMBEDDINGS = {
    "word_embeddings": "token_embd",
    "position_embeddings": "position_embd",
    "token_type_embeddings": "token_types",
    "LayerNorm": "token_embd_norm",
}
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
HEAD = {"classifier.dense": "cls", "classifier.out_proj": "cls.output"}
IN_FLOAT32 = ("position_embd.weight", "token_types.weight")
MAX_PAIRS = BATCH_TOKENS // 4
"""A pair has four special tokens at least, so more do not fit into a batch."""

Floats = npt.NDArray[np.float32]


def prepare(model: Model, precision: str) -> None:
    """Write the checkpoint as a GGUF file."""
    path = model.folder / f"{precision}.gguf"
    convert_once(path, lambda making: _convert(model.require_checkpoint(), precision, making), sources=[Path(__file__)])


def _convert(checkpoint: Path, precision: str, making: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(making, "bert")
    _write_shape(writer, config)
    for name, values in _tensors(load_file(checkpoint / "model.safetensors"), config):
        kind = Kind.F32 if values.ndim == 1 or name in IN_FLOAT32 else KINDS[precision]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_runner(model: Model, precision: str) -> Batched:
    """Load what `prepare` made."""
    config = json.loads((model.require_checkpoint() / "config.json").read_text(encoding="utf-8"))
    context = _open_context(model.folder / f"{precision}.gguf", model.threads)
    batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def run(inputs: Inputs) -> Scores:
        _fill(batch, inputs)
        if llama_cpp.llama_encode(context, batch):
            raise RuntimeError(f"llama.cpp cannot encode {batch.n_tokens} tokens")
        found = [llama_cpp.llama_get_embeddings_seq(context, row)[0] for row in range(len(inputs["input_ids"]))]
        return np.array(found, np.float32)

    return Batched(model, run, pad_token_id=int(config["pad_token_id"]), is_padded=False)


def _fill(batch: Any, inputs: Inputs) -> None:
    """Write the tokens without padding into llama.cpp's batch; each pair is a sequence."""
    is_token = inputs["attention_mask"].astype(bool)
    rows, places = np.nonzero(is_token)
    batch.n_tokens = count = len(rows)
    np.ctypeslib.as_array(batch.token, (count,))[:] = inputs["input_ids"][is_token]
    np.ctypeslib.as_array(batch.pos, (count,))[:] = places
    np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
    np.ctypeslib.as_array(batch.logits, (count,))[:] = 1
    for token, row in enumerate(rows.tolist()):
        batch.seq_id[token][0] = row


def _open_context(path: Path, threads: int) -> int:
    """Load a GGUF file for batches of BATCH_TOKENS, which are computed whole."""
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    if loaded is None:
        raise RuntimeError(f"llama.cpp cannot load {path.name}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = BATCH_TOKENS
    options.n_seq_max = MAX_PAIRS
    options.n_threads = options.n_threads_batch = threads
    options.embeddings = True
    options.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_RANK
    context = llama_cpp.llama_init_from_model(loaded, options)
    if context is None:
        raise RuntimeError(f"llama.cpp cannot run {path.name}")
    return int(context)


def _write_shape(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"] - config["pad_token_id"] - 1)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_tokenizer_model("none")


def _tensors(weights: Mapping[str, Floats], config: Mapping[str, Any]) -> Iterator[tuple[str, Floats]]:
    """Yield the weights by llama.cpp's names; positions begin behind the padding's."""
    names = {f"roberta.embeddings.{theirs}": ours for theirs, ours in EMBEDDINGS.items()} | HEAD
    for layer in range(config["num_hidden_layers"]):
        names |= {f"roberta.encoder.layer.{layer}.{theirs}": f"blk.{layer}.{ours}" for theirs, ours in LAYER.items()}
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            if (values := weights.get(f"{theirs}.{part}")) is not None:
                values = values[config["pad_token_id"] + 1 :] if ours == "position_embd" else values
                yield f"{ours}.{part}", np.ascontiguousarray(values, np.float32)


if __name__ == "__main__":
    serve(open_runner, prepare)
