"""Say what a training is: its numbers, what it is measured on, and how often it saves.

Knows nothing of PyTorch, so that `cappy adapt --help` starts fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from cappy_engine.errors import AdaptError
from cappy_engine.options import Asked, check_asked
from cappy_export.options import Revision

LAUNCHER = "CAPPY_LAUNCHER"
"""Where `cappy adapt --processes` puts its own process's number, so that the others end when it is killed."""
MIXED_PRECISIONS = ("auto", "no", "bf16", "fp16")
MOST_SEED = 2**64 - 1
"""The largest that PyTorch takes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hold every number of a training; the defaults are Cappy's (arXiv 2311.06720).

    >>> Recipe(epochs=3, learning_rate=5e-5)

    `batch_size` is the pairs of one optimiser step. They are computed in batches of at most `max_batch_tokens` padded
    tokens (gradient accumulation). `dropout` of None keeps the checkpoint's. With `keep_best` the result has the
    weights of the evaluation whose held-out loss was least, the earliest of equal ones. Raises ValueError for a number
    out of range.
    """

    epochs: Annotated[int, Asked("how often TRAIN is gone through (default: 1)", least=1)] = 1
    max_steps: Annotated[int | None, Asked("stop, and end the schedule, after so many steps", least=1)] = None
    batch_size: Annotated[int, Asked("pairs in a step (default: 128)", least=1)] = 128
    learning_rate: Annotated[float, Asked("at its peak (default: 2e-05)")] = 2e-5
    warmup_fraction: Annotated[float, Asked("of all steps, before the peak (default: 0.1)")] = 0.1
    weight_decay: Annotated[float, Asked("of the matrices, by AdamW (default: 0.0)", least=0)] = 0.0
    max_gradient_norm: Annotated[float, Asked("longer gradients are cut to it (default: 1.0)")] = 1.0
    dropout: Annotated[float | None, Asked("share of activations that are dropped (default: the checkpoint's)")] = None
    max_length: Annotated[int, Asked("longest pair in tokens (default: 512)", least=1)] = 512
    max_batch_tokens: Annotated[
        int,
        Asked("padded tokens computed at once; a step accumulates the gradients of several (default: 4096)", least=1),
    ] = 4096
    window: Annotated[
        int, Asked("examples that are shuffled, and sorted by length, together (default: 65536)", least=1)
    ] = 65536
    gradient_checkpointing: Annotated[bool, Asked("compute activations twice, to keep fewer in memory")] = False
    mixed_precision: Annotated[
        str, Asked("auto: bf16 or fp16 where the GPU has it, none on a CPU", choices=MIXED_PRECISIONS)
    ] = "auto"
    keep_best: Annotated[
        bool, Asked("write the weights of the evaluation with the least held-out loss, and not the last step's")
    ] = False
    seed: Annotated[
        int, Asked("of shuffling, dropout and the choice of held-out examples (default: 0)", most=MOST_SEED)
    ] = 0

    def __post_init__(self) -> None:
        check_asked(self)
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must be 0 to 1, got {self.warmup_fraction}")
        if self.dropout is not None:
            _check_part(dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """Say how a training reads, when it measures and saves, and whether it goes on.

    >>> AdaptOptions(held_out_fraction=0.1, save_every=50)

    With `from_samples` the files hold references and an LLM's samples (`samples.read_samples`), and each example gets
    `negatives` references of others. Without held-out examples of their own, `adapt` holds out all examples of
    `held_out_fraction` of the instructions. Several processes wait `wait_seconds` for each other, and no longer.
    `resume` goes on with a training that was stopped. `force` replaces `out`. It also replaces the folder of a stopped
    training, unless `resume` goes on with it. Raises ValueError for a number out of range.
    """

    revision: Revision = None
    from_samples: Annotated[
        bool,
        Asked("TRAIN holds references and an LLM's samples; labels are 1, 0 for other references, ROUGE-L for samples"),
    ] = False
    negatives: Annotated[int, Asked("other references per example (default: 1)", least=1)] = 1
    held_out_fraction: Annotated[float, Asked("part of TRAIN that is held out (default: 0.02)", least=0)] = 0.02
    evaluate_every: Annotated[
        int, Asked("steps between two measurements on held-out examples (default: 200)", least=1)
    ] = 200
    save_every: Annotated[int, Asked("steps between states that --resume can go on from (default: 200)", least=1)] = 200
    log_every: Annotated[int, Asked("steps between two lines of log.jsonl (default: 10)", least=1)] = 10
    wait_seconds: Annotated[
        int, Asked("how long several processes wait for each other, at most (default: 600)", least=1)
    ] = 600
    peak_tflops: Annotated[
        float | None, Asked("what one device can at most, in TFLOP/s, for share_of_peak in the log")
    ] = None
    resume: Annotated[bool, Asked("go on with a training that was stopped")] = False
    force: Annotated[bool, Asked("replace OUT if it exists, once the new one is complete")] = False

    def __post_init__(self) -> None:
        check_asked(self)
        _check_part(held_out_fraction=self.held_out_fraction)
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops must be a number above 0, got {self.peak_tflops}")


def choose_mixed_precision(asked: str, *, device: str, has_bf16: bool) -> str:
    """Choose the mixed precision to train with: "no", "bf16" or "fp16".

    >>> choose_mixed_precision("auto", device="cpu", has_bf16=False)
    'no'

    `device` is PyTorch's device type. Raises AdaptError where the device does not have what was asked for.
    """
    if asked == "auto":
        return "no" if device == "cpu" else "bf16" if has_bf16 else "fp16"
    if asked == "fp16" and device == "cpu":
        raise AdaptError("mixed precision fp16 needs a GPU; on the CPU choose no or bf16")
    if asked == "bf16" and device != "cpu" and not has_bf16:
        raise AdaptError("this GPU has no bf16; choose fp16 or no")
    return asked


def _check_part(**options: float) -> None:
    for name, value in options.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be 0 or more and less than 1, got {value}")


RECIPES: Mapping[str, tuple[Recipe, AdaptOptions]] = {
    "adaptation": (Recipe(), AdaptOptions()),
    "pretraining": (
        Recipe(batch_size=1024, learning_rate=1e-5, max_batch_tokens=16384),
        AdaptOptions(held_out_fraction=0.001, evaluate_every=1000, save_every=1000),
    ),
}
"""Defaults by what is done: an encoder becomes Cappy by "pretraining", and Cappy learns a task by "adaptation"."""
