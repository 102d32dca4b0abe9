"""What picking the best-scoring candidate is worth, by dataset, and in how many examples two sets of scores pick alike.

Both of the paper's protocols (arXiv 2311.06720, section 4) ask for this: on classification a candidate is worth 1 if
it is right, else 0; among an LLM's samples it is worth its ROUGE-L. The strictly greatest score wins, so the first
candidate wins a tie. Pure; knows nothing of files or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cappy_engine.pairs import Pair

Scores = npt.NDArray[np.floating]
Values = npt.NDArray[np.float64]
"""What an answer is worth, (examples,)."""

NORMAL_95 = 1.959964
"""The quantile of the normal distribution for intervals of 95%."""


@dataclass(frozen=True)
class Example:
    """An example's `rows`, the places of its candidates among all pairs, and what each is worth, 0 to 1."""

    dataset: str
    rows: tuple[int, ...]
    worths: tuple[float, ...]


@dataclass(frozen=True)
class Average:
    """The mean over `count` examples, which `low` and `high` bound at 95%."""

    count: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Flip:
    """An example on which two sets of scores pick differently.

    `margin` is how much higher the first one's pick scores in the first set, `gain` by how much the second one's is
    worth more.
    """

    dataset: str
    rows: tuple[int, ...]
    margin: float
    gain: float


@dataclass(frozen=True)
class Agreement:
    """Of `count` examples, those on which two sets of scores pick differently."""

    count: int
    flips: tuple[Flip, ...]

    @property
    def share(self) -> float:
        """The share of examples with the same pick."""
        return 1 - len(self.flips) / self.count


def pick(example: Example, scores: Scores) -> int:
    """The place among the example's candidates of the first that scores highest; `scores` are (pairs,)."""
    return int(scores[list(example.rows)].argmax())


def worths_of_picks(examples: Sequence[Example], scores: Scores) -> Values:
    """What the best-scoring candidate of each example is worth; `scores` are (pairs,)."""
    return np.array([example.worths[pick(example, scores)] for example in examples])


def worths_by_chance(examples: Sequence[Example]) -> Values:
    """What a random candidate of each example is worth on average."""
    return np.array([math.fsum(example.worths) / len(example.worths) for example in examples])


def worths_at_best(examples: Sequence[Example]) -> Values:
    """What the best candidate of each example is worth: no way to pick gets more."""
    return np.array([max(example.worths) for example in examples])


def average_by_dataset(examples: Sequence[Example], values: Values) -> dict[str, Average]:
    """The mean of `values` (examples,) by dataset, in the order in which datasets appear.

    Bounds are Wilson's where all values are 0 or 1, else the normal distribution's.
    """
    return {dataset: _average(found) for dataset, found in _by_dataset(examples, values).items()}


def average_over_datasets(examples: Sequence[Example], values: Values) -> Average:
    """The plain mean over datasets of the mean of `values` (examples,), as published.

    Its bounds take the datasets as given and their examples as independent.
    """
    found = _by_dataset(examples, values).values()
    mean = math.fsum(float(part.mean()) for part in found) / len(found)
    half = NORMAL_95 * math.sqrt(math.fsum(float(part.var()) / len(part) for part in found)) / len(found)
    return _bounded(values, mean, half)


def compare(examples: Sequence[Example], first: Scores, second: Scores) -> Agreement:
    """In how many examples two sets of scores (pairs,) pick the same candidate; the flips, closest first."""
    flips = []
    for example in examples:
        one, other = pick(example, first), pick(example, second)
        if one == other:
            continue
        margin = float(first[example.rows[one]]) - float(first[example.rows[other]])
        flips.append(Flip(example.dataset, example.rows, margin, example.worths[other] - example.worths[one]))
    return Agreement(len(examples), tuple(sorted(flips, key=lambda flip: flip.margin)))


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
        found.append(Example(example.dataset, rows, example.worths))
    return chosen, found


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95% interval of `right` of `count` (Wilson's score interval), which holds for few and for extreme ones."""
    share, square = right / count, NORMAL_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _by_dataset(examples: Iterable[Example], values: Values) -> Mapping[str, Values]:
    found: dict[str, list[float]] = {}
    for example, value in zip(examples, values.tolist(), strict=True):
        found.setdefault(example.dataset, []).append(value)
    return {dataset: np.array(part) for dataset, part in found.items()}


def _average(values: Values) -> Average:
    count, mean = len(values), float(values.mean())
    if np.isin(values, (0, 1)).all():
        return Average(count, mean, *wilson(float(values.sum()), count))
    return _bounded(values, mean, NORMAL_95 * math.sqrt(float(values.var()) / count))


def _bounded(values: Values, mean: float, half: float) -> Average:
    """Worths lie in 0 to 1, differences of worths in -1 to 1; so do their means."""
    least = -1.0 if (values < 0).any() else 0.0
    return Average(len(values), mean, max(least, mean - half), min(1.0, mean + half))
