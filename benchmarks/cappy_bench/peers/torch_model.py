"""Loads the checkpoint in PyTorch as transformers does; the runners of PyTorch share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from cappy_bench.peers.batches import Inputs, Run
from cappy_bench.peers.peer import Model, Scores

TYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_torch(model: Model, precision: str = "fp32") -> torch.nn.Module:
    """Load the model with its weights in `precision`, and transformers' choice of attention: SDPA, but for DeBERTa."""
    torch.set_num_threads(model.threads)
    loaded: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        model.require_checkpoint(), dtype=TYPES[precision]
    )
    return loaded.eval()


def pad_token_id(module: torch.nn.Module) -> int:
    """Read the padding's id from the model's config."""
    return int(module.config.pad_token_id)  # type: ignore[union-attr, arg-type]


def runs(module: torch.nn.Module, forward: Callable[..., Any] | None = None) -> Run:
    """Return a function that runs the module, or `forward` (its compiled form), on one batch, where the weights are."""
    device = next(module.parameters()).device
    names = ["input_ids", "attention_mask"]
    if getattr(module.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")

    def run(inputs: Inputs) -> Scores:
        with torch.inference_mode():
            output = (forward or module)(**{name: torch.from_numpy(inputs[name]).to(device) for name in names})
        scores: Scores = output.logits[:, 0].float().cpu().numpy()
        return scores

    return run
