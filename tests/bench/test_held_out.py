"""How accuracy on held-out examples is counted, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cappy_bench.quality.held_out import accuracies, chances, main

ROWS = [
    {"task": "t", "group": "1", "label": 1.0},
    {"task": "t", "group": "1", "label": 0.0},
    {"task": "t", "group": "2", "label": 0.0},
    {"task": "t", "group": "2", "label": 1.0},
    {"task": "t", "group": "2", "label": 1.0},
    {"task": "t", "group": "3", "label": 0.7},
    {"task": "trec", "group": "1", "label": 0.2},
    {"task": "trec", "group": "1", "label": 0.9},
]


def test_accuracy_counts_groups_by_their_best_label() -> None:
    scores = np.array([0.5, 0.5, 0.9, 0.1, 0.2, 0.3, 0.1, 0.2], dtype=np.float32)
    assert accuracies(ROWS, scores) == {"t": 0.5, "trec": 1.0}
    assert chances(ROWS) == {"t": pytest.approx((1 / 2 + 2 / 3) / 2), "trec": 0.5}


def test_of_labels_between_0_and_1_only_the_best_is_right() -> None:
    rows = [{"task": "t", "group": "1", "label": label} for label in (0.2, 0.7, 0.9)]
    assert [accuracies(rows, np.eye(3)[place]) for place in range(3)] == [{"t": 0.0}, {"t": 0.0}, {"t": 1.0}]
    assert chances(rows) == {"t": pytest.approx(1 / 3)}


def test_the_command_prints_a_table_of_pytorch_and_the_bundle(
    checkpoint: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "instruction": f"{row['group']}?", "response": str(place)} for place, row in enumerate(ROWS)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(tmp_path / "held_out.jsonl"), "--checkpoint", str(checkpoint), "--bundle", str(bundle)]
    main([*command, "--precision", "fp32"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "| task | groups | chance | PyTorch fp32 | fp32 |"
    assert shown[2].startswith("| t | 2 | 58.3 | ")
    cells = [line.split(" | ") for line in shown[2:]]
    assert [cell[0] for cell in cells] == ["| t", "| trec", "| **mean of the nine**", "| **mean of all**"]
    assert all(cell[-2] == cell[-1].removesuffix(" |") for cell in cells)  # fp32 decides as PyTorch
