"""Training goes on from cappy-mini's trained weights, as it does from cappy-large's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.adaptation.training import adapt
from tests.support.places import MINI, ROOT


@pytest.mark.slow
def test_adapting_to_the_pages_example_raises_its_held_out_accuracy_stopped_or_not(tmp_path: Path) -> None:
    def train(name: str, *, resume: bool = False, **others: Any) -> dict[str, Any]:
        return adapt(
            MINI,
            ROOT / "docs" / "examples" / "train.jsonl",
            tmp_path / name,
            recipe=Recipe(epochs=4, batch_size=12, learning_rate=3e-4, dropout=0.0),
            options=AdaptOptions(held_out_fraction=0.25, save_every=5, resume=resume),
            **others,
        )

    def keep(progress: Progress) -> None:
        """What a crash would leave here; test_stopped_training.py has a real SIGKILL."""
        if progress.step == progress.steps - 2:
            shutil.copytree(tmp_path / "whole.training", tmp_path / "parts.training")

    before, *_, after = train("whole", progress=keep)["log"]
    assert before["held_out_accuracy"] < 0.4
    assert after["held_out_accuracy"] > 0.7
    assert train("parts", resume=True)["log"][-1]["held_out_loss"] == after["held_out_loss"]
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
