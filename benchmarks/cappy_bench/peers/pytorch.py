"""Scores with PyTorch, in four ways: as it comes, compiled, under autocast, and with every pair padded.

Pairs come in sorted batches, as from a careful user. Only `padded` is the habit of Cappy's own scripts
(`padding="max_length"`), in batches of 16.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from cappy_bench.peers.batches import Batched, Inputs, Run
from cappy_bench.peers.peer import Model, Scores
from cappy_bench.peers.worker import serve

TYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PADDED_BATCH = 16
WARM_UP = [("a b c", "d"), ("a b c d e f g h i j k l", "m n o p q r s t u v w x y z")]


def open_runner(model: Model, precision: str) -> Batched:
    """Load the checkpoint with its weights in `precision`."""
    module = _load(model, precision)
    return Batched(model, runs(module), pad_token_id=pad_token_id(module))


def open_compiled(model: Model, precision: str) -> Batched:
    """Load the checkpoint with its weights in `precision`, for torch.compile (inductor) with dynamic shapes.

    Compiling is part of it: a batch of one pair and one of several, at two lengths, and the longest pair, so that no
    shape is special. The compiled kernels are kept in `model.folder`.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(model.folder.resolve() / "inductor")
    module = _load(model, precision)
    compiled = torch.compile(module, dynamic=True)
    runner = Batched(model, runs(module, compiled), pad_token_id=pad_token_id(module))
    longest = [("a " * model.max_length, "b")]
    for pairs in (WARM_UP, WARM_UP[:1], WARM_UP[1:], WARM_UP * 3, longest):
        runner.score(pairs)
    return runner


def open_autocast(model: Model, precision: str) -> Batched:
    """Load the checkpoint in float32, for torch.autocast to compute products in `precision`."""
    module = _load(model)
    forward = runs(module)

    def run(inputs: Inputs) -> Scores:
        with torch.autocast("cpu", dtype=TYPES[precision]):
            return forward(inputs)

    return Batched(model, run, pad_token_id=pad_token_id(module))


def open_padded(model: Model, precision: str) -> Batched:
    """Load the checkpoint with its weights in `precision`; every pair gets the model's longest length."""
    module, longest = _load(model, precision), model.max_length
    return Batched(
        model, runs(module), pad_token_id=pad_token_id(module), batch_tokens=PADDED_BATCH * longest, pad_to=longest
    )


WAYS = {"eager": open_runner, "compiled": open_compiled, "autocast": open_autocast, "padded": open_padded}


def pad_token_id(module: torch.nn.Module) -> int:
    """Read the padding's id from the model's config."""
    return int(module.config.pad_token_id)  # type: ignore[union-attr, arg-type]


def runs(module: torch.nn.Module, forward: Callable[..., Any] | None = None) -> Run:
    """Return a function that runs the module on one batch, where the weights are.

    `forward`, the module's compiled form, runs instead if it is given.
    """
    called, device = module if forward is None else forward, next(module.parameters()).device
    names = ["input_ids", "attention_mask"]
    if getattr(module.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")

    def run(inputs: Inputs) -> Scores:
        with torch.inference_mode():
            output = called(**{name: torch.from_numpy(inputs[name]).to(device) for name in names})
        scores: Scores = output.logits[:, 0].float().cpu().numpy()
        return scores

    return run


def _load(model: Model, precision: str = "fp32") -> torch.nn.Module:
    """Load the model with its weights in `precision`, and transformers' choice of attention: SDPA, but for DeBERTa."""
    torch.set_num_threads(model.threads)
    loaded: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        model.require_checkpoint(), dtype=TYPES[precision]
    )
    return loaded.eval()


if __name__ == "__main__":
    serve(WAYS[sys.argv[1]])
