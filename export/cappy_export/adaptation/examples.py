"""Read pairs with labels from JSON Lines, and hold a part of them out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cappy_engine.bulk.jsonl import open_lines
from cappy_engine.bulk.rows import Row, read_rows
from cappy_engine.checks import shown
from cappy_engine.errors import AdaptError, InvalidLine
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

    Raises InvalidPair, and ValueError if there are not as many labels as pairs.
    """
    checked, listed = check_pairs(pairs), list(labels)
    if len(checked) != len(listed):
        raise ValueError(f"each pair needs a label; there are {len(checked)} pairs and {len(listed)} labels")
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(instruction, len(numbers)) for instruction, _ in checked]
    return Examples(checked, np.array(listed, dtype=np.float32), np.array(groups, dtype=np.int64))


def read_examples(path: str | Path) -> Examples:
    """Read examples from JSON Lines with `instruction`, `response` and `label`.

    >>> len(read_examples("docs/examples/train.jsonl"))

    A label is a number of 0 (wrong) to 1 (right). Raises AdaptError, with the line's number, for a bad line and for a
    label out of range; and for a file without examples.
    """
    try:
        with open_lines(path) as file:
            rows = list(read_rows(file))
        labels = [read_label(row) for row in rows]
    except InvalidLine as error:
        raise AdaptError(f"{path}, {error}") from error
    except OSError as error:
        raise AdaptError(f"the examples cannot be read: {error}") from error
    if not rows:
        raise AdaptError(f"{path} holds no examples")
    return make_examples([row.pair for row in rows], labels)


def read_label(row: Row) -> float:
    """Read the label of a row; raises InvalidLine if there is none of 0 to 1.

    >>> read_label(Row(1, {"label": 0.5}, ("instruction", "response")))
    0.5
    """
    label = row.fields.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float)):
        found = "no field 'label'" if "label" not in row.fields else f"the label {shown(label)}, which is not a number"
        raise InvalidLine(row.number, f"has {found}; each example needs one of 0 (wrong) to 1 (right)")
    if not 0 <= label <= 1:  # nor NaN
        raise InvalidLine(row.number, f"has the label {shown(label)}; labels go from 0 (wrong) to 1 (right)")
    return float(label)


def hold_out(examples: Examples, fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """Split into (training, held out): all examples of about `fraction` of the instructions are held out.

    >>> training, held_out = hold_out(examples, 0.02, seed=0)

    Raises AdaptError if that leaves nothing to train on.
    """
    groups = sorted(set(examples.groups.tolist()))
    random.Random(seed).shuffle(groups)  # noqa: S311 - a sample, no secret
    count = math.ceil(fraction * len(groups)) if fraction else 0
    if count >= len(groups):
        raise AdaptError(
            f"holding out {fraction:g} of {len(groups)} instructions leaves none to train on; give more examples, or "
            "your own held-out file"
        )
    is_held_out = np.isin(examples.groups, groups[:count])
    return examples.take(np.flatnonzero(~is_held_out)), examples.take(np.flatnonzero(is_held_out))


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
