"""Measure accuracy by task: of the candidates of one instruction, does the right one score best?

    python -m cappy_bench.quality.held_out HELD_OUT.jsonl --checkpoint CHECKPOINT --bundle BUNDLE --precision int8

HELD_OUT.jsonl has instruction, response, label, task and group. Prints a Markdown table: chance, PyTorch in float32
(one pair at a time) and the bundle. Chance is the accuracy of a random pick. Groups whose candidates are all equally
right are left out, and so are tasks without any group. The mean is over tasks.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cappy_bench.quality.picking import Example, Scores, Values, average_by_dataset, worths_by_chance, worths_of_picks
from cappy_engine.bulk.formats.json_lines import open_lines, read_rows
from cappy_engine.bundle import EMBEDDED
from cappy_engine.scorer import Scorer
from cappy_export.proof.reference import score_checkpoint
from cappy_mini.mixture import EASY


def examples_of(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Group rows into examples, by task; a candidate is worth 1 if it has its group's best label, else 0.

    >>> rows = [{"task": "trec", "group": "1", "label": 1.0}, {"task": "trec", "group": "1", "label": 0.0}]
    >>> examples_of(rows)[0].worths
    (1.0, 0.0)

    Groups in which all labels are equal are left out.
    """
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[row["task"], row["group"]].append(place)
    examples = []
    for (task, _), places in groups.items():
        labels = [rows[place]["label"] for place in places]
        if len(set(labels)) > 1:
            examples.append(Example(task, tuple(places), tuple(float(label == max(labels)) for label in labels)))
    return sorted(examples, key=lambda example: example.dataset)


def accuracies(rows: Sequence[Mapping[str, Any]], scores: Scores) -> dict[str, float]:
    """Compute, by task, the share of groups whose best-scoring candidate has the best label.

    >>> accuracies(rows, np.array([0.9, 0.1]))
    {'trec': 1.0}
    """
    examples = examples_of(rows)
    return _means(examples, worths_of_picks(examples, scores))


def chances(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute, by task, the accuracy of a random pick.

    >>> chances(rows)
    {'trec': 0.5}
    """
    examples = examples_of(rows)
    return _means(examples, worths_by_chance(examples))


def _means(examples: Sequence[Example], values: Values) -> dict[str, float]:
    return {task: found.mean for task, found in average_by_dataset(examples, values).items()}


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Mapping[str, float]]) -> str:
    """Write accuracies in percent as Markdown: a row per task, then the means over the easy tasks and over all.

    >>> print(table(rows, {"int8": accuracies(rows, np.array([0.9, 0.1]))}))
    """
    groups = Counter(example.dataset for example in examples_of(rows))
    chance = chances(rows)
    lines = [
        f"| task | groups | chance | {' | '.join(columns)} |",
        f"|---|---:|---:|{'---:|' * len(columns)}",
    ]
    for task in groups:
        shown = " | ".join(f"{100 * column[task]:.1f}" for column in columns.values())
        lines.append(f"| {task} | {groups[task]} | {100 * chance[task]:.1f} | {shown} |")
    for name, tasks in (("mean of the nine", [task for task in EASY if task in groups]), ("mean of all", list(groups))):
        shown = " | ".join(f"{100 * _mean(column, tasks):.2f}" for column in columns.values())
        lines.append(f"| **{name}** | | {100 * _mean(chance, tasks):.1f} | {shown} |")
    return "\n".join(lines)


def _mean(column: Mapping[str, float], tasks: Sequence[str]) -> float:
    return float(np.mean([column[task] for task in tasks])) if tasks else float("nan")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED, help="default: cappy-mini, the package's own")
    parser.add_argument("--precision", action="append", default=[], dest="precisions")
    options = parser.parse_args(argv)
    with open_lines(options.held_out) as lines:
        rows = [row.fields for row in read_rows(lines)]
    pairs = [(row["instruction"], row["response"]) for row in rows]
    columns = {}
    if options.checkpoint:
        columns["PyTorch fp32"] = accuracies(rows, score_checkpoint(options.checkpoint, pairs))
    for precision in options.precisions:
        with Scorer.open(options.bundle, precision=precision, device="cpu") as scorer:
            columns[precision] = accuracies(rows, scorer.score(pairs))
    print(table(rows, columns))


if __name__ == "__main__":
    main()
