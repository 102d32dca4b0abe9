"""The checkpoint in PyTorch, as transformers loads it: shared by the runners of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AutoModelForSequenceClassification

from cappy_bench.peers.batches import Ids, Run
from cappy_bench.peers.peer import Model, Scores


def load_torch(model: Model) -> torch.nn.Module:
    """The model in float32 and evaluation mode, with scaled-dot-product attention, its fastest on a CPU."""
    torch.set_num_threads(model.threads)
    loaded: torch.nn.Module = AutoModelForSequenceClassification.from_pretrained(
        model.checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )
    return loaded.eval()


def pad_token_id(module: torch.nn.Module) -> int:
    """The id that pads, from the model's config."""
    return int(module.config.pad_token_id)  # type: ignore[union-attr, arg-type]


def runs(forward: Callable[..., object]) -> Run:
    """Call `forward` (the module, or its compiled form) on one batch; scores (batch,) float32."""

    def run(ids: Ids, mask: Ids, type_ids: Ids) -> Scores:
        with torch.inference_mode():
            output = forward(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        scores: Scores = output.logits[:, 0].numpy()  # type: ignore[attr-defined]
        return scores

    return run
