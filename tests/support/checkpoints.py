"""Copies of a checkpoint that tests may change, and inputs for its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FILES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "msgpack": "flax_model.msgpack"}


def copy(checkpoint: Path, folder: Path, *, weights: str | None = "safetensors") -> Path:
    """A copy of the checkpoint with one format of weights, or none."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*FILES.values()))
    if weights is not None:
        shutil.copyfile(checkpoint / FILES[weights], folder / FILES[weights])
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def random_inputs(batch: int, length: int) -> dict[str, npt.NDArray[np.int64]]:
    """Rows for the tiny checkpoint's model, all but the first padded on the right."""
    random = np.random.default_rng(batch * 1000 + length)
    ids = random.integers(5, 1000, (batch, length))
    ids[:, 0] = 0
    mask = np.ones_like(ids)
    for row in range(1, batch):
        kept = int(random.integers(2, length + 1))
        ids[row, kept:], mask[row, kept:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}
