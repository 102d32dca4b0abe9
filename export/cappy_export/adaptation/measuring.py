"""Score pairs with the model that is trained, and measure it on the held-out examples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from cappy_engine.batching import Batch, plan_batches
from cappy_export.adaptation.examples import Examples, grouped_accuracy
from cappy_export.adaptation.launch import refuse
from cappy_export.adaptation.schedule import share_of
from cappy_export.adaptation.stream import Window


def score_batch(model: nn.Module, window: Window, batch: Batch, *, pad_token_id: int, device: Any) -> torch.Tensor:
    """Compute `logits[:, 0]` of a batch: (batch,) float32.

    >>> score_batch(model, window, batch, pad_token_id=1, device="cpu").shape
    torch.Size([8])
    """
    inputs = window.inputs(batch.rows, batch.length, pad_token_id=pad_token_id)
    tensors = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
    logits: torch.Tensor = model(**tensors).logits
    return logits[:, 0].float()


@dataclass(frozen=True)
class HeldOut:
    """Hold the examples that are measured on; `encoded` are their tokens.

    >>> HeldOut(accelerator, examples, encoded, pad_token_id=1, max_batch_tokens=4096).measure(model, 200)
    {'held_out_loss': 0.1167, 'held_out_accuracy': 0.75}
    """

    accelerator: Accelerator
    examples: Examples
    encoded: Window
    pad_token_id: int
    max_batch_tokens: int

    def measure(self, model: nn.Module, number: int) -> dict[str, float]:
        """Measure loss and grouped accuracy after step `number`; nothing without examples.

        A loss that is no finite number ends the training, as `refuse` does.
        """
        if not len(self.examples):
            return {}
        scores = self._predict(model)
        accuracy, groups = grouped_accuracy(scores, self.examples)
        loss = float(np.square(scores - self.examples.labels).mean())
        if not math.isfinite(loss):
            refuse(
                self.accelerator,
                f"the held-out loss after step {number} is {loss}; lower the learning rate, or look at the examples",
            )
        return {"held_out_loss": loss} | ({"held_out_accuracy": accuracy} if groups else {})

    def _predict(self, model: nn.Module) -> npt.NDArray[np.float32]:
        """Score the examples; each process computes its share of the batches, and all know all scores."""
        plain = self.accelerator.unwrap_model(model).eval()
        scores = torch.zeros(len(self.encoded), device=self.accelerator.device)
        batches = plan_batches(self.encoded.lengths, max_batch_tokens=self.max_batch_tokens)
        with torch.inference_mode():
            for _, batch in share_of(batches, self.accelerator.process_index, self.accelerator.num_processes):
                scores[torch.from_numpy(batch.rows)] = score_batch(
                    plain, self.encoded, batch, pad_token_id=self.pad_token_id, device=self.accelerator.device
                )
        found: npt.NDArray[np.float32] = self.accelerator.reduce(scores, reduction="sum").cpu().numpy()
        return found
