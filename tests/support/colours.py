"""A task that a tiny model learns in seconds, and what a training of it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from cappy_export.adaptation.examples import Examples, make_examples
from cappy_export.adaptation.recipe import Recipe

COLOURS = "red green blue yellow black white brown pink".split()
RECIPE = Recipe(learning_rate=3e-3, batch_size=16, epochs=8, dropout=0.0, max_length=64, max_batch_tokens=256)


def colour_examples(count: int) -> Examples:
    """A task that is learnt in seconds: does the response repeat the colour that the instruction names?"""
    pairs, labels = [], []
    for number in range(count):
        right, wrong = COLOURS[number % 8], COLOURS[(number * 3 + 1 + number // 8) % 8]
        instruction = f"Object {number} is {right}. Which colour has it?"
        pairs += [(instruction, right)] + ([(instruction, wrong)] if wrong != right else [])
        labels += [1.0] + ([0.0] if wrong != right else [])
    return make_examples(pairs, labels)


def write_examples(path: Path, examples: Examples) -> Path:
    rows = [
        {"instruction": instruction, "response": response, "label": float(label)}
        for (instruction, response), label in zip(examples.pairs, examples.labels, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights_of(first), weights_of(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class StoppedError(Exception):
    """Stands for a crash in the middle of a training."""
