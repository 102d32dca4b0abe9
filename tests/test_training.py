"""The scripts that make cappy-mini: which examples a stage sees, and how accuracy is counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from training.evaluate import accuracies, chances
from training.mixture import EASY, STAGES, select


def test_a_mixture_takes_whole_groups_and_about_the_fraction_asked_for() -> None:
    rows = [
        {"task": task, "group": f"{number}", "response": candidate}
        for task in ("trec", "piqa", "unknown")
        for number in range(400)
        for candidate in "ab"
    ]
    lines = [json.dumps(row) for row in rows]
    chosen = [json.loads(line) for line in select(lines, {"trec": 0.5, "piqa": 1.0}, seed=0)]
    counts = {task: sum(row["task"] == task for row in chosen) for task in ("trec", "piqa", "unknown")}
    assert counts["piqa"] == 800
    assert counts["unknown"] == 0
    assert 300 < counts["trec"] < 500
    groups = [row["group"] for row in chosen if row["task"] == "trec"]
    assert all(groups.count(group) == 2 for group in set(groups))
    assert [json.dumps(row) for row in chosen] == list(select(lines, {"trec": 0.5, "piqa": 1.0}, seed=0))
    assert set(STAGES[1]) == set(EASY)


def test_accuracy_counts_groups_by_their_best_label() -> None:
    rows = [
        {"task": "t", "group": "1", "label": 1.0},
        {"task": "t", "group": "1", "label": 0.0},
        {"task": "t", "group": "2", "label": 0.0},
        {"task": "t", "group": "2", "label": 1.0},
        {"task": "t", "group": "2", "label": 1.0},
        {"task": "t", "group": "3", "label": 0.7},
        {"task": "u", "group": "1", "label": 0.2},
        {"task": "u", "group": "1", "label": 0.9},
    ]
    scores = np.array([0.5, 0.5, 0.9, 0.1, 0.2, 0.3, 0.1, 0.2], dtype=np.float32)
    assert accuracies(rows, scores) == {"t": 0.5, "u": 1.0}
    assert chances(rows) == {"t": pytest.approx((1 / 2 + 2 / 3) / 2), "u": 0.5}
