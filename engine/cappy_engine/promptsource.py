"""Cappy's zero-shot protocol on PromptSource's tasks (arXiv 2311.06720, section 4.1): pick the best response, count.

A line is {dataset_name, template_name, example_idx, instruction, response, label}. Lines that agree in the first three
are the candidates of one example, wherever they stand in the file. The strictly greatest score wins, so the first
candidate wins a tie; it is right if its label is 1. Accuracy is by dataset, then the plain mean over datasets.

An example without a right candidate is wrong whatever is picked, and counts: leaving it out would flatter. Pure but for
reading lines; knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import Pair, read_fields

Scores = npt.NDArray[np.float32]

TEXTS = ("dataset_name", "template_name", "instruction", "response")
NORMAL_95 = 1.959964
"""The quantile of the normal distribution for intervals of 95%."""


@dataclass(frozen=True)
class Example:
    """An example's `rows`, the places of its candidates in the file, and whether each `is_right`."""

    dataset: str
    rows: tuple[int, ...]
    is_right: tuple[bool, ...]


@dataclass(frozen=True)
class Accuracy:
    """Of `count` examples; `low` and `high` bound it at 95%, `chance` is what a random pick gets."""

    count: int
    accuracy: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Flip:
    """An example on which two sets of scores pick differently; `margin` is how much higher the first one's pick scores
    in the first set, and `change` what that does to the answer: "lost", "gained" or "none"."""

    dataset: str
    rows: tuple[int, ...]
    margin: float
    change: str


@dataclass(frozen=True)
class Agreement:
    """Of `count` examples, in how many the pick is the same, and the others."""

    count: int
    flips: tuple[Flip, ...]

    @property
    def share(self) -> float:
        """The share of examples with the same pick."""
        return 1 - len(self.flips) / self.count


def read_examples(lines: Iterable[bytes]) -> tuple[list[Pair], list[Example]]:
    """The pairs of all lines, in their order, and the examples, in the order in which they first appear.

    Raises InvalidLine for a line that is not of the protocol's form, and for a label other than 0 and 1.
    """
    pairs: list[Pair] = []
    groups: dict[tuple[str, str, str], list[tuple[int, bool]]] = {}
    for number, line in enumerate(lines, start=1):
        fields = read_fields(line, number, TEXTS)
        if fields is None:
            continue
        for name in ("example_idx", "label"):
            if name not in fields:
                raise InvalidLine(number, f"has no field {name!r}")
        if fields["label"] not in (0, 1):  # True and 1.0 are 1, too
            raise InvalidLine(number, f"label must be 0 or 1, got {fields['label']!r:.60}")
        key = (fields["dataset_name"], fields["template_name"], repr(fields["example_idx"]))
        groups.setdefault(key, []).append((len(pairs), fields["label"] == 1))
        pairs.append((fields["instruction"], fields["response"]))
    examples = [
        Example(dataset, tuple(row for row, _ in found), tuple(is_right for _, is_right in found))
        for (dataset, _, _), found in groups.items()
    ]
    return pairs, examples


def first_examples(
    pairs: Sequence[Pair], examples: Sequence[Example], most: int | None
) -> tuple[list[Pair], list[Example]]:
    """At most `most` examples of each dataset, the first ones (None: all), and the pairs that they need."""
    taken: dict[str, int] = {}
    chosen: list[Pair] = []
    found: list[Example] = []
    for example in examples:
        taken[example.dataset] = taken.get(example.dataset, 0) + 1
        if most is not None and taken[example.dataset] > most:
            continue
        rows = tuple(range(len(chosen), len(chosen) + len(example.rows)))
        chosen += [pairs[row] for row in example.rows]
        found.append(Example(example.dataset, rows, example.is_right))
    return chosen, found


def accuracies(examples: Sequence[Example], scores: Scores) -> dict[str, Accuracy]:
    """Accuracy by dataset, in the order of the file; `scores` are (pairs,) float32."""
    by_dataset: dict[str, list[Example]] = {}
    for example in examples:
        by_dataset.setdefault(example.dataset, []).append(example)
    return {dataset: _accuracy(found, scores) for dataset, found in by_dataset.items()}


def mean_accuracy(found: Mapping[str, Accuracy]) -> Accuracy:
    """The plain mean over datasets, as published; its bounds take the datasets as independent."""
    rows = list(found.values())
    accuracy = sum(row.accuracy for row in rows) / len(rows)
    variance = sum(row.accuracy * (1 - row.accuracy) / row.count for row in rows) / len(rows) ** 2
    half = NORMAL_95 * math.sqrt(variance)
    chance = sum(row.chance for row in rows) / len(rows)
    return Accuracy(
        sum(row.count for row in rows), accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half), chance
    )


def compare(examples: Sequence[Example], first: Scores, second: Scores) -> Agreement:
    """In how many examples two sets of scores (pairs,) pick the same candidate; the flips, closest first."""
    flips = []
    for example in examples:
        one, other = _pick(example, first), _pick(example, second)
        if one == other:
            continue
        rows = np.array(example.rows)
        margin = float(first[rows[one]]) - float(first[rows[other]])
        was, becomes = example.is_right[one], example.is_right[other]
        change = "none" if was == becomes else "lost" if was else "gained"
        flips.append(Flip(example.dataset, example.rows, margin, change))
    return Agreement(len(examples), tuple(sorted(flips, key=lambda flip: flip.margin)))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of `right` of `count` (Wilson's score interval), which holds for few and for extreme ones."""
    share, square = right / count, NORMAL_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _accuracy(examples: Sequence[Example], scores: Scores) -> Accuracy:
    right = sum(example.is_right[_pick(example, scores)] for example in examples)
    chance = sum(sum(example.is_right) / len(example.rows) for example in examples) / len(examples)
    return Accuracy(len(examples), right / len(examples), *wilson(right, len(examples)), chance)


def _pick(example: Example, scores: Scores) -> int:
    """The place among the example's candidates of the first that scores highest."""
    return int(scores[list(example.rows)].argmax())
