"""Hold pairs with labels, and measure scores of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.checks import shown
from cappy_engine.errors import InvalidLine
from cappy_engine.pairs import Pair, check_pairs
from cappy_engine.ranking import first_best

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Hold n `pairs`, their `labels` (n,) float32, and `groups` (n,) int64: one number for pairs of one instruction."""

    pairs: list[Pair]
    labels: npt.NDArray[np.float32]
    groups: Rows

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: Rows) -> Examples:
        """Take the examples at `rows`, in that order."""
        return Examples([self.pairs[row] for row in rows], self.labels[rows], self.groups[rows])


def make_examples(pairs: Iterable[Sequence[str]], labels: Iterable[float]) -> Examples:
    """Make examples of `pairs` and their `labels`, grouped by instruction.

    >>> make_examples([("a", "1"), ("b", "1"), ("a", "2")], [1, 1, 0]).groups.tolist()
    [0, 1, 0]

    Raises InvalidPair, and ValueError if there are not as many labels as pairs, or one is not of 0 to 1.
    """
    checked, listed = check_pairs(pairs), list(labels)
    if len(checked) != len(listed):
        raise ValueError(f"each pair needs a label; there are {len(checked)} pairs and {len(listed)} labels")
    for row, label in enumerate(listed):
        if not 0 <= label <= 1:  # nor NaN
            raise ValueError(f"pair {row} has the label {shown(label)}; labels go from 0 (wrong) to 1 (right)")
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(instruction, len(numbers)) for instruction, _ in checked]
    return Examples(checked, np.array(listed, dtype=np.float32), np.array(groups, dtype=np.int64))


def check_label(fields: Mapping[str, Any], number: int, unit: str = "line") -> float:
    """Return the label among the fields of a row; raises InvalidLine if there is none of 0 to 1.

    >>> check_label({"label": 0.5}, 1)
    0.5
    """
    label = fields.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float)):
        found = "no field 'label'" if "label" not in fields else f"the label {shown(label)}, which is not a number"
        raise InvalidLine(number, f"has {found}; each example needs one of 0 (wrong) to 1 (right)", unit)
    if not 0 <= label <= 1:  # nor NaN
        raise InvalidLine(number, f"has the label {shown(label)}; labels go from 0 (wrong) to 1 (right)", unit)
    return float(label)


def grouped_accuracy(scores: npt.NDArray[np.float32], examples: Examples) -> tuple[float, int]:
    """Count in which part of the groups the best-scoring candidate has the best label: (accuracy, groups).

    >>> grouped_accuracy(np.float32([0.9, 0.1]), make_examples([("a", "1"), ("a", "2")], [1, 0]))
    (1.0, 1)

    Groups with one candidate, or with one label for all, say nothing and are left out. The first of equal scores wins.
    Accuracy is NaN without groups.
    """
    correct = counted = 0
    if not len(examples):
        return math.nan, 0
    order = np.argsort(examples.groups, kind="stable")
    starts = np.flatnonzero(np.diff(examples.groups[order])) + 1
    for rows in np.split(order, starts):
        labels = examples.labels[rows]
        if labels.min() < labels.max():
            counted += 1
            correct += int(labels[first_best(scores[rows])] == labels.max())
    return (correct / counted if counted else math.nan), counted
