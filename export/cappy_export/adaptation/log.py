"""Keep the log of a training: a line of JSON for steps, with loss and speed, and one for every evaluation.

Evaluations have no `gradient_norm`, and steps no held-out figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cappy_engine import storage

LOG = "log.jsonl"
WORTH_A_NOTE = 1.02
"""How many times the least held-out loss the last one may be before it is told of: less is often chance."""
COLLECTED = ("losses", "tokens", "truncated", "seconds", "unmeasured")
"""What a meter has of the steps before, which a training that goes on must know."""


@dataclass(frozen=True)
class Progress:
    """Tell where a training is: `loss` is this step's mean squared error, `held_out` the last evaluation's figures."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    held_out: dict[str, float] | None


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Write an entry at the end of a folder's log.

    >>> append(Path("my-cappy.training"), {"step": 0, "held_out_loss": 0.25})
    """
    with storage.naming(folder / LOG), (folder / LOG).open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """List the evaluations in a folder's log. Raises ValueError or TypeError for a damaged one.

    >>> evaluations(Path("my-cappy.training"))[0]["step"]
    0
    """
    entries = [json.loads(line) for line in (folder / LOG).read_bytes().splitlines()]
    return [entry for entry in entries if "gradient_norm" not in entry]


def least_loss(entries: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Find the least held-out loss after a step, and the step: the earliest of equal ones; (inf, 0) if there is none.

    >>> least_loss([{"step": 200, "held_out_loss": 0.1}, {"step": 400, "held_out_loss": 0.2}])
    (0.1, 200)
    """
    found = [(entry["held_out_loss"], entry["step"]) for entry in entries if entry["step"] and "held_out_loss" in entry]
    return min(found, default=(math.inf, 0))


def tell_of_result(entries: Sequence[Mapping[str, Any]], steps: int, *, is_best: bool) -> list[str]:
    """Say which step's weights are written, and which were better.

    >>> tell_of_result([{"step": 0, "held_out_loss": 0.2}, {"step": 9, "held_out_loss": 0.1}], 9, is_best=True)
    ['the weights are those of step 9 of 9, the best evaluation: held-out loss 0.1']

    They are the last ones, or with `is_best` those of `least_loss`.
    """
    losses = {entry["step"]: entry["held_out_loss"] for entry in entries if "held_out_loss" in entry}
    if not losses:
        return []
    least, best = least_loss(entries)
    told = []
    if losses.get(0, math.inf) <= least:
        told.append(f"note: the held-out loss was {losses[0]:.4g} before the first step, and never less after it")
    if is_best:
        told.append(f"the weights are those of step {best} of {steps}, the best evaluation: held-out loss {least:.4g}")
    elif losses[steps] > WORTH_A_NOTE * least:
        told.append(
            f"note: the held-out loss was least after step {best}, {least:.4g}, and {losses[steps]:.4g} in the end; "
            "--keep-best writes the weights of the best evaluation"
        )
    return told


@dataclass
class Meter:
    """Collects the steps since the last line of the log: losses, tokens and the seconds that they took.

    `unmeasured` are the losses since the last evaluation.

    >>> meter = Meter(flops_per_token=6e6)
    >>> meter.add(0.25, tokens=4096, truncated=0, seconds=0.5)
    >>> meter.entry(10, learning_rate=2e-5, gradient_norm=1.5)["tokens_per_second"]
    8192
    """

    flops_per_token: float
    peak_flops: float | None = None
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0
    unmeasured: list[float] = field(default_factory=list)

    def add(self, loss: float, *, tokens: int, truncated: int, seconds: float) -> None:
        """Count a step; `tokens` are those of all processes, without padding, and `truncated` its cut examples."""
        self.losses.append(loss)
        self.unmeasured.append(loss)
        self.tokens += tokens
        self.truncated += truncated
        self.seconds += seconds

    def entry(self, step: int, *, learning_rate: float, gradient_norm: float) -> dict[str, Any]:
        """Make a line of the log, and start anew. The learning rate and the gradient's norm are those of `step`."""
        speed = self.tokens / max(self.seconds, 1e-9)
        found: dict[str, Any] = {
            "step": step,
            "loss": float(np.mean(self.losses)),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "tokens_per_second": round(speed),
            "truncated": self.truncated,
        }
        if self.peak_flops:
            found["share_of_peak"] = round(self.flops_per_token * speed / self.peak_flops, 4)
        self.losses, self.tokens, self.truncated, self.seconds = [], 0, 0, 0.0
        return found

    def mean(self) -> float:
        """Give the mean loss since the last evaluation, and start anew."""
        found, self.unmeasured = float(np.mean(self.unmeasured)), []
        return found

    def document(self) -> dict[str, Any]:
        """Write what was collected for a file of JSON."""
        return {name: getattr(self, name) for name in COLLECTED}

    def take(self, document: Mapping[str, Any]) -> None:
        """Take over what `document` wrote. Raises KeyError or TypeError for anything else."""
        for name in COLLECTED:
            setattr(self, name, document[name])
