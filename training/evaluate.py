"""Accuracy by task: of the candidates of one instruction, does the right one score best?

    python -m training.evaluate HELD_OUT.jsonl --checkpoint CHECKPOINT --bundle BUNDLE --precision int8

HELD_OUT.jsonl has instruction, response, label, task and group. Prints a Markdown table: chance, PyTorch in float32
(one pair at a time) and the bundle. Chance is what a random pick gets; groups whose candidates are all equally right
are left out, and so are tasks without any group. The mean is over tasks.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.scorer import Scorer
from cappy_export.checkpoint import open_checkpoint
from cappy_export.reference import score_with_torch
from training.mixture import EASY

Scores = npt.NDArray[np.float32]


def group_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[int]]]:
    """By task: the places of each group's rows, for groups whose labels differ."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[row["task"], row["group"]].append(place)
    tasks: dict[str, list[list[int]]] = defaultdict(list)
    for (task, _), places in groups.items():
        if len({rows[place]["label"] for place in places}) > 1:
            tasks[task].append(places)
    return dict(sorted(tasks.items()))


def accuracies(rows: Sequence[Mapping[str, Any]], scores: Scores) -> dict[str, float]:
    """By task: the share of groups whose best-scoring candidate (the first, in a tie) has the best label."""
    return {
        task: float(np.mean([_is_right([rows[place]["label"] for place in group], scores[group]) for group in groups]))
        for task, groups in group_rows(rows).items()
    }


def chances(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By task: the accuracy of a random pick."""
    found = {}
    for task, groups in group_rows(rows).items():
        labels = [[rows[place]["label"] for place in group] for group in groups]
        found[task] = float(np.mean([group.count(max(group)) / len(group) for group in labels]))
    return found


def _is_right(labels: Sequence[float], scores: Scores) -> bool:
    return labels[int(scores.argmax())] == max(labels)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Mapping[str, float]]) -> str:
    """Accuracies in percent, one row per task, then the means over the easy tasks and over all."""
    groups = group_rows(rows)
    chance = chances(rows)
    lines = [
        f"| task | groups | chance | {' | '.join(columns)} |",
        f"|---|---:|---:|{'---:|' * len(columns)}",
    ]
    for task in groups:
        shown = " | ".join(f"{100 * column[task]:.1f}" for column in columns.values())
        lines.append(f"| {task} | {len(groups[task])} | {100 * chance[task]:.1f} | {shown} |")
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
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--precision", action="append", default=[], dest="precisions")
    options = parser.parse_args(argv)
    with options.held_out.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [(row["instruction"], row["response"]) for row in rows]
    columns = {}
    if options.checkpoint:
        reference = score_with_torch(open_checkpoint(options.checkpoint), pairs, max_length=512)
        columns["PyTorch fp32"] = accuracies(rows, reference.scores)
    for precision in options.precisions:
        with Scorer.open(options.bundle, precision=precision, device="cpu") as scorer:
            columns[precision] = accuracies(rows, scorer.score(pairs))
    print(table(rows, columns))


if __name__ == "__main__":
    main()
