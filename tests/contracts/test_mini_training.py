"""Training goes on from cappy-mini's trained weights, as it does from cappy-large's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cappy_export.adaptation.examples import Examples, make_examples
from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.recipe import AdaptOptions, Recipe
from cappy_export.adaptation.training import adapt
from tests.support.places import MINI, ROOT, data_rows

BIGBENCH_TASK = "few_shot_nlg"


def bigbench(task: str, split: str, count: int) -> Examples:
    """`count` examples, five for each instruction: its reference with label 1, those of the next four with 0."""
    rows = data_rows(f"bigbench/{task}_{split}.jsonl.gz")
    pairs, labels = [], []
    for place, row in enumerate(rows):
        for distance in range(5):
            pairs.append((row["instruction"], rows[(place + distance) % len(rows)]["references"][0]))
            labels.append(float(distance == 0))
    assert len(pairs) >= count
    return make_examples(pairs[:count], labels[:count])


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
        """What a crash would leave here; test_training.py has a real SIGKILL."""
        if progress.step == 12:
            shutil.copytree(tmp_path / "whole.training", tmp_path / "parts.training")

    before, *_, after = train("whole", progress=keep)["log"]
    assert before["held_out_accuracy"] < 0.4
    assert after["held_out_accuracy"] > 0.7
    assert train("parts", resume=True)["log"][-1]["held_out_loss"] == after["held_out_loss"]
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_five_hundred_examples_of_a_new_task_lower_its_held_out_loss(tmp_path: Path) -> None:
    log = adapt(
        MINI,
        bigbench(BIGBENCH_TASK, "train", 500),
        tmp_path / "adapted",
        held_out=bigbench(BIGBENCH_TASK, "validation", 150),
        recipe=Recipe(epochs=1, batch_size=8, learning_rate=6e-5, max_length=128),
    )["log"]
    assert log[-1]["held_out_loss"] < 0.9 * log[0]["held_out_loss"]
