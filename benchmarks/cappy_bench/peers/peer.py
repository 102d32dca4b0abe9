"""What is measured: a runner scores pairs with one tool in one setting. Imports numpy only: every environment loads it.

A runner is a module of `cappy_bench.peers` with two functions, called in a process of its own, in the tool's own
environment:

    prepare(model, precision)                convert what the tool needs into `model.folder`, once; not timed
    open_runner(model, precision) -> Runner  load it, ready to score

`prepare` may be missing where the tool reads a checkpoint or a bundle as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Pair = tuple[str, str]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """What is scored with: a `checkpoint` folder of transformers, our `bundle` of the same weights, a `folder` where a
    runner keeps what it converted, and how many `threads` it may use. A pair has at most `max_length` tokens."""

    checkpoint: Path
    bundle: Path
    folder: Path
    threads: int
    max_length: int = 512


class Runner(Protocol):
    """A tool with the model loaded.

    `computed_tokens` counts the tokens that the model computed so far, padding included; None where the tool does not
    show it.
    """

    computed_tokens: int | None

    def score(self, pairs: Sequence[Pair], *, pad_to: int | None = None) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order. With `pad_to` every pair is computed at that length."""

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
