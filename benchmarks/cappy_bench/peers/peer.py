"""Defines a runner: it scores pairs with one tool in one setting. It needs numpy only.

A runner is a module of `cappy_bench.peers` with two functions. It runs as a program (`worker.serve`), in a process and
in an environment of its own:

    prepare(model, precision)                convert what the tool needs into `model.folder`; not timed
    open_runner(model, precision) -> Runner  load it, ready to score

`prepare` converts by `conversions.convert_once`: again only where a package, the CPU or the code has changed.
transformers.js takes what optimum converted, as it is. `prepare` may be missing where the tool reads a
checkpoint or a bundle as it is. A module that opens its tool in several ways has them by name in WAYS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Pair = tuple[str, str]
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """The model that all runners score with, and what they may use.

    `bundle` is ours, `checkpoint` a folder of transformers with the same weights. Without a checkpoint only our own
    engine can be measured. A runner keeps in `folder` what it converted, and uses at most `threads`; a pair has at most
    `max_length` tokens.
    """

    bundle: Path
    folder: Path
    threads: int
    checkpoint: Path | None = None
    max_length: int = 512

    def require_checkpoint(self) -> Path:
        """Return the checkpoint. Raises ValueError where there is none.

        >>> Model(Path("bundle"), Path("work"), 2, Path("checkpoint")).require_checkpoint()
        PosixPath('checkpoint')
        """
        if self.checkpoint is None:
            raise ValueError("this runner reads a checkpoint, and none was given")
        return self.checkpoint

    def to_json(self) -> str:
        """Write the model as a JSON object, with whole paths.

        >>> Model.from_json(Model(Path("/bundle"), Path("/work"), 2).to_json()).threads
        2
        """
        paths = {"bundle": self.bundle, "folder": self.folder, "checkpoint": self.checkpoint}
        whole = {name: path and os.path.realpath(path) for name, path in paths.items()}
        return json.dumps({**whole, "threads": self.threads, "max_length": self.max_length})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        paths = {name: values[name] and Path(values[name]) for name in ("bundle", "folder", "checkpoint")}
        return cls(**{**values, **paths})


class Runner(Protocol):
    """A tool with the model loaded."""

    @property
    def computed_tokens(self) -> int | None:
        """Tokens that were computed so far, padding included; None where the tool hides it."""

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Return raw scores of n pairs: (n,) float32, in input order.

        >>> runner.score([("Is the sky blue?", "Yes")])
        """

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Return the token ids, without padding, that `score` gives the model for each pair.

        >>> runner.token_ids([("Is the sky blue?", "Yes")])
        """
