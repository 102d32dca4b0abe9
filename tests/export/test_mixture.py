"""Which examples a stage of cappy-mini's training sees."""

from __future__ import annotations

import json
from pathlib import Path

from cappy_mini.mixture import EASY, STAGES, main, select


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


def test_the_command_writes_the_lines_of_its_stage(tmp_path: Path) -> None:
    lines = [json.dumps({"task": task, "group": "1"}) + "\n" for task in ("sst2", "hellaswag", "copa")]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    for stage, kept in ((1, lines[:1]), (2, [lines[0], lines[2]])):
        main([str(tmp_path / "train.jsonl"), str(stage), str(tmp_path / f"stage{stage}.jsonl")])
        assert (tmp_path / f"stage{stage}.jsonl").read_text() == "".join(kept)
