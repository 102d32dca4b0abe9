"""Evaluate by one of the paper's protocols, and write that as text or JSON. Pure.

Ways to answer have names: "fp32" and the like pick the candidate that scores best, "random" any. Figures are means over
the examples of a dataset, then over datasets; people read them in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cappy_bench.quality.picking import (
    Agreement,
    Average,
    Example,
    Scores,
    Values,
    average_by_dataset,
    average_over_datasets,
    compare,
    count_ties,
    worths_at_best,
    worths_by_chance,
    worths_of_picks,
)
from cappy_engine.checks import printable

CHANCE, BEST, PYTORCH = "random", "oracle", "PyTorch"
WIDEST_FLIPS = 5


@dataclass(frozen=True)
class Evaluation:
    """The worth of each of the `ways` to answer, (examples,) float64 by name; `scorers` names those by scores.

    `measure` is "accuracy" or "ROUGE-L"; `agreements` have names as "int8 against PyTorch"; `notes` are for readers.
    """

    measure: str
    examples: Sequence[Example]
    ways: Mapping[str, Values]
    scorers: tuple[str, ...]
    agreements: Mapping[str, Agreement]
    notes: tuple[str, ...] = ()


def evaluate(
    measure: str,
    examples: Sequence[Example],
    scores: Mapping[str, Scores],
    *,
    others: Mapping[str, Values] | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Evaluate scorers beside chance, the best possible and other ways to answer.

    `scores` are (pairs,) by the scorer's name, `others` (examples,) by the way's. The decisions of all scorers are
    compared with the first one's. A note tells how often only the order of equal scores decides.

        >>> found = evaluate("accuracy", [Example("RTE", (0, 1), (1.0, 0.0))], {"fp32": np.array([0.9, 0.1])})
        >>> list(found.ways)
        ['random', 'fp32', 'oracle']
    """
    picked = {name: worths_of_picks(examples, found) for name, found in scores.items()}
    bounds = {CHANCE: worths_by_chance(examples), BEST: worths_at_best(examples)}
    first, *rest = scores
    agreements = {f"{name} against {first}": compare(examples, scores[first], scores[name]) for name in rest}
    ways = {**(others or {}), CHANCE: bounds[CHANCE], **picked, BEST: bounds[BEST]}
    counts = {name: count_ties(examples, found) for name, found in scores.items()}
    ties = [
        f"{name}: in {count} of {len(examples)} examples several candidates score best and are not equally good; the "
        "first of them is the answer"
        for name, count in counts.items()
        if count
    ]
    return Evaluation(measure, examples, ways, tuple(picked), agreements, (*notes, *ties))


def describe_accuracy(found: Evaluation) -> str:
    """Write a table of chance and each scorer by dataset, with 95% bounds; then agreement and flips.

    >>> print(describe_accuracy(found))
    """
    chance, *columns = (_averages(found, name) for name in (CHANCE, *found.scorers))
    width = max(len(dataset) for dataset, _ in [("dataset", None), *chance])
    lines = [f"{'dataset':<{width}}  examples  chance" + "".join(f"  {name:<20}" for name in found.scorers)]
    for place, (dataset, cell) in enumerate(chance):
        shown = "".join(f"  {_percent(column[place][1]):<20}" for column in columns)
        lines.append(f"{dataset:<{width}}  {cell.count:>8}  {100 * cell.mean:>6.1f}{shown}".rstrip())
    return _finish([*lines, *_agreement_lines(found)], found)


def describe_rouge(found: Evaluation) -> str:
    """Write a table of each way to answer by task, with bounds; then agreement.

    The bounds are 95%. Beside each mean stands by how much the first scorer is better.

        >>> print(describe_rouge(found))
    """
    columns = {name: _averages(found, name) for name in found.ways}
    tasks = columns[CHANCE]
    width = max(len(task) for task, _ in tasks)
    lines = [
        f"{found.measure} x 100: the mean over the examples of a task, then over tasks",
        "",
        f"{'task':<{width}}  examples" + "".join(f"  {name:>5}" for name in columns),
    ]
    for place, (task, cell) in enumerate(tasks):
        cells = ((name, column[place][1]) for name, column in columns.items())
        shown = "".join(f"  {100 * column.mean:>{max(5, len(name))}.1f}" for name, column in cells)
        lines.append(f"{task:<{width}}  {cell.count:>8}{shown}")
    return _finish([*lines, "", *_mean_lines(found), *_agreement_lines(found)], found)


def evaluation_document(found: Evaluation) -> dict[str, Any]:
    """Write the same as JSON, not in percent, with every flip.

    >>> evaluation_document(found)["measure"]
    'accuracy'
    """
    first = found.scorers[0]
    return {
        "measure": found.measure,
        "averages": {
            name: {
                "datasets": {key: asdict(cell) for key, cell in average_by_dataset(found.examples, values).items()},
                "mean": asdict(average_over_datasets(found.examples, values)),
            }
            for name, values in found.ways.items()
        },
        "differences": {
            f"{first} above {name}": asdict(_difference(found, first, name))
            for name in found.ways
            if name not in found.scorers
        },
        "agreement": {
            name: {"share": part.share, "examples": part.count, "flips": [asdict(flip) for flip in part.flips]}
            for name, part in found.agreements.items()
        },
        "notes": list(found.notes),
    }


def _averages(found: Evaluation, name: str) -> list[tuple[str, Average]]:
    """List (dataset, average), and at the end ("mean", the average over datasets)."""
    values = found.ways[name]
    overall = average_over_datasets(found.examples, values)
    return [*average_by_dataset(found.examples, values).items(), ("mean", overall)]


def _difference(found: Evaluation, name: str, other: str) -> Average:
    return average_over_datasets(found.examples, found.ways[name] - found.ways[other], least=-1.0)


def _mean_lines(found: Evaluation) -> list[str]:
    first = found.scorers[0]
    width = max(map(len, [*found.ways, "mean over tasks"]))
    lines = [f"{'mean over tasks':<{width}}  (95% bounds)          {first} is better by (95% bounds)"]
    for name, values in found.ways.items():
        shown = f"{name:<{width}}  {_percent(average_over_datasets(found.examples, values)):<20}"
        if name not in found.scorers:
            shown += f"  {_percent(_difference(found, first, name), sign='+')}"
        lines.append(shown.rstrip())
    return lines


def _agreement_lines(found: Evaluation) -> list[str]:
    worse, better = ("right answers lost", "gained") if found.measure == "accuracy" else ("worse answers", "better")
    lines = []
    for name, part in found.agreements.items():
        lost, gained = sum(flip.gain < 0 for flip in part.flips), sum(flip.gain > 0 for flip in part.flips)
        lines += [
            "",
            f"{name}: the same decision in {part.count - len(part.flips)} of {part.count} examples "
            f"({100 * part.share:.2f}%); {lost} {worse}, {gained} {better}",
        ]
        if part.flips:
            margins = ", ".join(f"{flip.margin:.2g}" for flip in part.flips[-WIDEST_FLIPS:][::-1])
            lines.append(f"  margins of the widest flips, in the first one's scores: {margins}")
    return lines


def _percent(cell: Average, *, sign: str = "") -> str:
    return f"{100 * cell.mean:{sign}.1f} ({100 * cell.low:{sign}.1f} to {100 * cell.high:{sign}.1f})"


def _finish(lines: Sequence[str], found: Evaluation) -> str:
    notes = ["", *found.notes] if found.notes else []
    return "\n".join(map(printable, [*lines, *notes]))
