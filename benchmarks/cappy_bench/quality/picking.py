"""Measure the worth of picking the best-scoring candidate, and how often scores pick alike.

Both of the paper's protocols (arXiv 2311.06720, section 4) ask for this: on classification a candidate is worth 1 if
it is right, else 0; among an LLM's samples it is worth its ROUGE-L. The first candidate wins a tie. Pure; knows nothing
of files or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cappy_engine.pairs import Pair
from cappy_engine.ranking import first_best

Scores = npt.NDArray[np.floating]
Values = npt.NDArray[np.float64]
"""The worth of an answer to each example, (examples,)."""
Places = npt.NDArray[np.int64]

NORMAL_95 = 1.959964
"""The quantile of the normal distribution for intervals of 95%."""


@dataclass(frozen=True)
class Example:
    """An example: `rows`, the places of its candidates among all pairs, and their `worths`, 0 to 1.

    `name` says where it is from. Examples of a dataset with the same `cluster` ask the same thing in other words, so
    their answers are not independent; None is alone.
    """

    dataset: str
    rows: tuple[int, ...]
    worths: tuple[float, ...]
    cluster: str | None = None
    name: str = ""


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

    `margin` is the distance of the two picks in the first set's scores; `gain` is how much more the second pick is
    worth.
    """

    dataset: str
    name: str
    rows: tuple[int, ...]
    margin: float
    gain: float


@dataclass(frozen=True)
class Agreement:
    """The `flips` among `count` examples: those on which two sets of scores pick differently."""

    count: int
    flips: tuple[Flip, ...]

    @property
    def share(self) -> float:
        """The share of examples with the same pick."""
        return 1 - len(self.flips) / self.count


def pick(example: Example, scores: Scores) -> int:
    """Pick the best-scoring candidate of an example, by its place among them; `scores` are (pairs,).

    >>> pick(Example("RTE", (1, 2), (1.0, 0.0)), np.array([0.9, 0.1, 0.2]))
    1
    """
    return first_best(scores[list(example.rows)])


def worths_of_picks(examples: Sequence[Example], scores: Scores) -> Values:
    """Give the worth of each example's best-scoring candidate; `scores` are (pairs,).

    >>> worths_of_picks([Example("RTE", (0, 1), (1.0, 0.0))], np.array([0.9, 0.1]))
    array([1.])
    """
    return np.array([example.worths[pick(example, scores)] for example in examples])


def count_ties(examples: Sequence[Example], scores: Scores) -> int:
    """Count the examples whose best score several candidates of different worth have: their order decides.

    >>> count_ties([Example("RTE", (0, 1), (1.0, 0.0))], np.array([0.5, 0.5]))
    1
    """
    count = 0
    for example in examples:
        found = scores[list(example.rows)]
        best = {worth for worth, is_best in zip(example.worths, found == found.max(), strict=True) if is_best}
        count += len(best) > 1
    return count


def worths_by_chance(examples: Sequence[Example]) -> Values:
    """Give the mean worth of each example's candidates, which a random pick gets.

    >>> worths_by_chance([Example("RTE", (0, 1), (1.0, 0.0))])
    array([0.5])
    """
    return np.array([math.fsum(example.worths) / len(example.worths) for example in examples])


def worths_at_best(examples: Sequence[Example]) -> Values:
    """Give the worth of each example's best candidate: no way to pick gets more.

    >>> worths_at_best([Example("RTE", (0, 1), (1.0, 0.0))])
    array([1.])
    """
    return np.array([max(example.worths) for example in examples])


def average_by_dataset(examples: Sequence[Example], values: Values) -> dict[str, Average]:
    """Average `values` (examples,), 0 to 1, by dataset, in the order in which datasets appear.

        >>> average_by_dataset([Example("RTE", (0,), (1.0,))] * 2, np.array([1.0, 0.0]))["RTE"].mean
        0.5

    Clusters are taken as independent, not examples. Where all values are 0 or 1, bounds are Wilson's for as many
    examples as would vary alike if they were independent (for as many as there are clusters, if all values are equal).
    Else they are the normal distribution's, of the sums over clusters, so too narrow for a few and of no width where
    all values are equal. One cluster alone says nothing, and has the whole range.
    """
    found = _by_dataset(examples, values)
    return {dataset: _clipped(_average(*part, least=0.0), least=0.0) for dataset, part in found.items()}


def average_over_datasets(examples: Sequence[Example], values: Values, *, least: float = 0.0) -> Average:
    """Average `values` (examples,) by dataset, and then, as published, plainly over datasets.

        >>> average_over_datasets([Example("RTE", (0,), (1.0,))] * 2, np.array([1.0, 0.0])).mean
        0.5

    Values go from `least` to 1: 0 for worths, -1 for differences of worths. The bounds take the datasets as given, and
    add up the squares of how far each one's bounds are from its mean, or of half their width if that is more. Unlike a
    variance this does not collapse if all answers of a dataset are right. For few examples they are rather too wide; if
    all differences of all datasets are equal they have no width.
    """
    found = [_average(*part, least=least) for part in _by_dataset(examples, values).values()]
    mean = math.fsum(part.mean for part in found) / len(found)
    below = [max(part.mean - part.low, (part.high - part.low) / 2) for part in found]
    above = [max(part.high - part.mean, (part.high - part.low) / 2) for part in found]
    low, high = mean - math.hypot(*below) / len(found), mean + math.hypot(*above) / len(found)
    return _clipped(Average(len(values), mean, low, high), least=least)


def compare(examples: Sequence[Example], first: Scores, second: Scores) -> Agreement:
    """Compare the picks of two sets of scores (pairs,); flips are sorted, the closest first.

    >>> compare([Example("RTE", (0, 1), (1.0, 0.0))], np.array([0.9, 0.1]), np.array([0.2, 0.4])).share
    0.0
    """
    flips = []
    for example in examples:
        one, other = pick(example, first), pick(example, second)
        if one == other:
            continue
        margin = float(first[example.rows[one]]) - float(first[example.rows[other]])
        gain = example.worths[other] - example.worths[one]
        flips.append(Flip(example.dataset, example.name, example.rows, margin, gain))
    return Agreement(len(examples), tuple(sorted(flips, key=lambda flip: flip.margin)))


def first_examples(
    pairs: Sequence[Pair], examples: Sequence[Example], most: int | None
) -> tuple[list[Pair], list[Example]]:
    """Take the examples of the first `most` clusters of each dataset (None: all), and the pairs they need.

    >>> first_examples([("Is it wet?", "Yes")], [Example("RTE", (0,), (1.0,))], 1)[0]
    [('Is it wet?', 'Yes')]
    """
    taken: dict[str, set[str | int]] = {}
    chosen: list[Pair] = []
    found: list[Example] = []
    for place, example in enumerate(examples):
        key = place if example.cluster is None else example.cluster
        clusters = taken.setdefault(example.dataset, set())
        if most is not None and key not in clusters and len(clusters) >= most:
            continue
        clusters.add(key)
        rows = tuple(range(len(chosen), len(chosen) + len(example.rows)))
        chosen += [pairs[row] for row in example.rows]
        found.append(replace(example, rows=rows))
    return chosen, found


def wilson(right: float, count: float) -> tuple[float, float]:
    """Compute the 95% interval of `right` of `count`: Wilson's, which holds for few and for extreme ones.

    >>> wilson(20, 20)
    (0.8388..., 1.0)
    """
    share, square = right / count, NORMAL_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _by_dataset(examples: Iterable[Example], values: Values) -> Mapping[str, tuple[Values, Places]]:
    """Collect the values of each dataset, and the number of each value's cluster."""
    found: dict[str, list[float]] = {}
    numbers: dict[str, dict[str | int, int]] = {}
    places: dict[str, list[int]] = {}
    for place, (example, value) in enumerate(zip(examples, values.tolist(), strict=True)):
        known = numbers.setdefault(example.dataset, {})
        key = place if example.cluster is None else example.cluster
        places.setdefault(example.dataset, []).append(known.setdefault(key, len(known)))
        found.setdefault(example.dataset, []).append(value)
    return {dataset: (np.array(part), np.array(places[dataset])) for dataset, part in found.items()}


def _average(values: Values, clusters: Places, *, least: float) -> Average:
    """Compute the mean and its bounds, which may lie beyond the range of the values."""
    count, groups, mean = len(values), int(clusters.max()) + 1, float(values.mean())
    sums = np.bincount(clusters, weights=values - mean)
    variance = float((sums**2).sum()) / count**2 * groups / (groups - 1) if groups > 1 else math.inf
    if least == 0 and np.isin(values, (0, 1)).all():
        independent = _independent(mean * (1 - mean), variance, groups, count)
        return Average(count, mean, *wilson(mean * independent, independent))
    if groups == 1:
        return Average(count, mean, least, 1.0)
    half = NORMAL_95 * math.sqrt(variance)
    return Average(count, mean, mean - half, mean + half)


def _independent(alone: float, variance: float, groups: int, count: int) -> float:
    """Count the independent examples of variance `alone` whose mean has `variance`; at least 1, at most all."""
    if groups in (1, count) or not alone:
        return groups
    return max(1.0, min(count, alone / variance)) if variance else count


def _clipped(found: Average, *, least: float) -> Average:
    return replace(found, low=max(least, found.low), high=min(1.0, found.high))
