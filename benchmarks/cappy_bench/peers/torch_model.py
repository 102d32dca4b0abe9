"""Loads the checkpoint in PyTorch as transformers does; the runners of PyTorch share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import AutoModelForSequenceClassification

from cappy_bench.peers.batches import Inputs, Run
from cappy_bench.peers.peer import Model, Scores

TYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_torch(model: Model, precision: str = "fp32") -> torch.nn.Module:
    """Load the model with its weights in `precision`, and scaled-dot-product attention, its fastest on a CPU."""
    torch.set_num_threads(model.threads)
    loaded: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        model.require_checkpoint(), dtype=TYPES[precision], attn_implementation="sdpa"
    )
    return loaded.eval()


def pad_token_id(module: torch.nn.Module) -> int:
    """Read the padding's id from the model's config."""
    return int(module.config.pad_token_id)  # type: ignore[union-attr, arg-type]


def runs(forward: Callable[..., object]) -> Run:
    """Return a function that calls `forward` (the module, or its compiled form) on one batch."""

    def run(inputs: Inputs) -> Scores:
        with torch.inference_mode():
            output = forward(**{name: torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask")})
        scores: Scores = output.logits[:, 0].float().numpy()  # type: ignore[attr-defined]
        return scores

    return run
