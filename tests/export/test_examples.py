"""Labelled examples: what a line must hold, which instructions are held out, and what grouped accuracy counts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.errors import AdaptError, InvalidLine
from cappy_export.adaptation import scanning
from cappy_export.adaptation.examples import Examples, check_label, grouped_accuracy, make_examples
from cappy_export.adaptation.scanning import Counted, Scan, choose, count, number_of
from cappy_export.adaptation.shards import HeldShard, Shard, find_shards, read_all

GOOD = '{"instruction": "Is the sky blue?", "response": "Yes", "label": 1}\n'

# (instruction, label, score) per example, with many equal labels and scores
marked = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from([0, 0.25, 1]), st.integers(-2, 2)), max_size=30)
instructions = st.lists(st.integers(0, 12).map(str), min_size=2, max_size=40).filter(lambda names: len(set(names)) > 1)


def line_with(label: str) -> str:
    return f'{{"instruction": "a", "response": "b", "label": {label}}}\n'


def numbered(names: list[str]) -> Examples:
    """Examples of the instructions `names`, told apart by response and label."""
    return make_examples(
        [(name, str(row)) for row, name in enumerate(names)], [row / 1024 for row in range(len(names))]
    )


def read_examples(path: Path) -> Examples:
    rows = list(read_all(find_shards(path)))
    return make_examples([row.pair for row in rows], [row.label for row in rows])


def scanned(shards: Sequence[Shard], fraction: float, *, seed: int, processes: int = 1) -> Scan:
    """Scan shards as so many processes do."""
    parts = [Counted() for _ in range(processes)]
    for process, part in enumerate(parts):
        for _ in count(shards, range(process, len(shards), processes), seed=seed, found=part):
            pass
    return choose(parts, fraction, source=shards[0].name)


def hold_out(examples: Examples, fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """Split into those that a stream would train on, and those that are held out."""
    scan = scanned([HeldShard(examples)], fraction, seed=seed)
    is_kept = [number_of(instruction, seed) > scan.threshold for instruction, _ in examples.pairs]
    assert sum(is_kept) == scan.examples
    return examples.take(np.flatnonzero(is_kept)), scan.held_out


def rows_of(examples: Examples) -> list[int]:
    return [int(response) for _, response in examples.pairs]


# Reading


def test_pairs_and_labels_may_come_from_any_iterable() -> None:
    pairs, labels = [("a", "1"), ("b", "1"), ("a", "2")], [1, 1, 0]
    found = make_examples(iter(pairs), iter(labels))
    assert found.pairs == pairs
    assert found.labels.tolist() == labels
    assert found.groups.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="there are 3 pairs and 2 labels"):
        make_examples(pairs, labels[:2])


@pytest.mark.parametrize("label", [-0.1, 5, float("nan"), float("inf")])
def test_labels_in_memory_are_those_of_a_file(label: float) -> None:
    with pytest.raises(ValueError, match=rf"pair 1 has the label {label}; labels go from 0 \(wrong\) to 1 \(right\)"):
        make_examples([("a", "1"), ("b", "1")], [1, label])


def test_examples_are_the_lines_of_a_file_in_its_order(tmp_path: Path) -> None:
    lines = [("q", "x", 1), ("p", "y", 0.25), ("q", "é\n", 0), ("q", "x", 0.5)]
    fields = [{"instruction": a, "response": b, "label": label, "id": 7} for a, b, label in lines]
    (tmp_path / "train.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, fields)), encoding="utf-8")
    examples = read_examples(tmp_path / "train.jsonl")
    assert examples.pairs == [(a, b) for a, b, _ in lines]
    assert examples.labels.tolist() == [1.0, 0.25, 0.0, 0.5]
    assert examples.groups.tolist() == [0, 1, 0, 0]
    assert [examples.labels.dtype.name, examples.groups.dtype.name] == ["float32", "int64"]
    assert len(examples) == 4


@given(label=st.integers(0, 1) | st.floats(0, 1))
def test_any_number_of_0_to_1_is_a_label(label: float) -> None:
    assert check_label({"label": label}, 1) == label


@given(
    label=st.floats(min_value=1, exclude_min=True)
    | st.floats(max_value=0, exclude_max=True)
    | st.sampled_from([math.nan, 2, -1, True, False, None, "1", "", [1], {"label": 1}])
)
def test_anything_else_is_no_label(label: Any) -> None:
    with pytest.raises(InvalidLine, match=r"^line 9: has the label .* 0 \(wrong\) to 1 \(right\)$"):
        check_label({"label": label}, 9)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (line_with("1.5"), r"has the label 1\.5; labels go from 0 \(wrong\) to 1 \(right\)"),
        (line_with("NaN"), r"not JSON \(NaN is not a value of JSON"),
        (line_with("-Infinity"), r"not JSON \(-Infinity is not a value of JSON"),
        (line_with("1" + "0" * 400), r"has the label 1000.*; labels go from 0"),  # an int beyond a float's range
        (line_with(json.dumps("x" * 100_000)), r"has the label 'xxx.*, which is not a number"),
        (line_with("true"), r"has the label True, which is not a number"),
        (line_with('"0.5"'), r"has the label '0\.5', which is not a number"),
        ('{"instruction": "a", "response": "b", "Label": 1}', r"has no field 'label'; each example needs one of 0"),
        ('{"instruction": "a", "label": 1}', r"has no field 'response'"),
        ('{"instruction": "a\\ud800", "response": "b", "label": 1}', r"instruction has a lone surrogate"),
        ("oops", r"not JSON"),
    ],
    ids=lambda text: text[-60:],
)
def test_a_bad_line_is_refused_by_file_and_number(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD + "\n" + line)
    with pytest.raises(AdaptError, match=rf"train\.jsonl, line 3: {problem}") as caught:
        read_examples(path)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_a_file_without_examples_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    for name, problem in [("empty", "holds no examples"), ("blank", "holds no examples"), ("none", "cannot be read")]:
        with pytest.raises(AdaptError, match=problem) as caught:
            scanned(find_shards(tmp_path / f"{name}.jsonl"), 0.0, seed=0)
        assert f"{name}.jsonl" in str(caught.value)


def test_take_gives_the_rows_in_the_order_asked_for() -> None:
    taken = numbered(["p", "q", "p", "r"]).take(np.array([3, 0, 2]))
    assert taken.pairs == [("r", "3"), ("p", "0"), ("p", "2")]
    assert taken.labels.tolist() == [3 / 1024, 0, 2 / 1024]
    assert taken.groups.tolist() == [2, 0, 0]


# Holding out


@given(names=instructions, fraction=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_about_the_fraction_of_the_instructions_is_held_out_whole(names: list[str], fraction: float, seed: int) -> None:
    examples = numbered(names)
    training, held_out = hold_out(examples, fraction, seed=seed)
    kept, held = ({name for name, _ in part.pairs} for part in (training, held_out))
    assert kept
    assert not kept & held
    assert fraction * len(set(names)) <= len(held) <= fraction * len(set(names)) + 1
    assert bool(held) == (fraction > 0)
    assert sorted(rows_of(training) + rows_of(held_out)) == list(range(len(names)))
    for part in (training, held_out):
        assert rows_of(part) == sorted(rows_of(part))
        assert part.labels.tolist() == [row / 1024 for row in rows_of(part)]


def test_what_is_held_out_depends_on_the_seed_alone() -> None:
    examples = numbered([str(row % 50) for row in range(100)])
    held = [rows_of(hold_out(examples, 0.2, seed=seed)[1]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("most", [4096, 20])
def test_what_is_held_out_depends_neither_on_the_shards_nor_on_the_processes(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are more instructions than are counted."""
    monkeypatch.setattr(scanning, "MOST_HELD_OUT", most)
    examples = numbered([str(row % 200) for row in range(600)])
    parts = [HeldShard(examples.take(rows)) for rows in np.array_split(np.arange(600), 7)]
    scans = [scanned(parts, 0.05, seed=3, processes=processes) for processes in (1, 2, 5)]
    whole = scanned([HeldShard(examples)], 0.05, seed=3)
    assert len({(scan.examples, scan.threshold, tuple(scan.held_out.pairs)) for scan in [*scans, whole]}) == 1
    assert len({scan.digest for scan in scans}) == 1
    counted = Counted()
    for _ in count(parts, range(7), seed=3, found=counted):
        pass
    assert (len(counted.smallest), counted.has_more) == ((200, False) if most == 4096 else (20, True))
    held = len({instruction for instruction, _ in whole.held_out.pairs})
    assert held == 10 if most == 4096 else 5 <= held <= 20


def test_nothing_is_held_out_of_one_instruction_unless_asked() -> None:
    training, held_out = hold_out(numbered(["p", "p"]), 0, seed=0)
    assert (len(training), len(held_out)) == (2, 0)


@pytest.mark.parametrize(("names", "fraction"), [(["p"] * 9, 0.01), (["p", "q"], 0.6), (["p", "q", "r"], 1.0)])
def test_holding_out_all_instructions_is_refused(names: list[str], fraction: float) -> None:
    with pytest.raises(AdaptError, match=rf"^holding out {fraction:g} of {len(set(names))} instructions leaves none"):
        hold_out(numbered(names), fraction, seed=0)


# Grouped accuracy


@given(marked=marked.filter(bool))
def test_grouped_accuracy_is_that_of_a_count_by_hand(marked: list[tuple[str, float, int]]) -> None:
    candidates = defaultdict(list)
    for instruction, label, score in marked:
        candidates[instruction].append((label, score))
    right = []
    for group in candidates.values():
        best_label, chosen = max(label for label, _ in group), group[0]
        for candidate in group[1:]:
            chosen = candidate if candidate[1] > chosen[1] else chosen
        if any(label != best_label for label, _ in group):
            right.append(chosen[0] == best_label)
    examples = make_examples([(instruction, "") for instruction, _, _ in marked], [label for _, label, _ in marked])
    accuracy, groups = grouped_accuracy(np.array([score for _, _, score in marked], dtype=np.float32), examples)
    assert groups == len(right)
    assert accuracy == pytest.approx(sum(right) / len(right) if right else math.nan, nan_ok=True)


def test_accuracy_is_nan_without_examples() -> None:
    accuracy, groups = grouped_accuracy(np.zeros(0, dtype=np.float32), make_examples([], []))
    assert math.isnan(accuracy)
    assert groups == 0
