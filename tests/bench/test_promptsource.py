"""Cappy's zero-shot protocol: the numbers of its definition, written again in the plainest way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_bench.quality.picking import (
    Example,
    average_by_dataset,
    average_over_datasets,
    first_examples,
    worths_by_chance,
    worths_of_picks,
)
from cappy_bench.quality.promptsource import read_examples
from cappy_engine.errors import InvalidLine
from tests.support.protocol_rows import Row, choice, lines_of


def by_definition(rows: list[Row], scores: list[float]) -> dict[str, float]:
    """Accuracy by dataset: group by the three keys, take the strictly greatest score's candidate, is its label 1?"""
    best: dict[tuple[str, str, int], tuple[float, int]] = {}
    for fields, score in zip(rows, scores, strict=True):
        key = (fields["dataset_name"], fields["template_name"], fields["example_idx"])
        if key not in best or score > best[key][0]:
            best[key] = (score, fields["label"])
    found: dict[str, list[int]] = {}
    for (dataset, _, _), (_, label) in best.items():
        found.setdefault(dataset, []).append(label)
    return {dataset: sum(labels) / len(labels) for dataset, labels in found.items()}


rows_of_files = st.lists(
    st.builds(
        choice,
        st.sampled_from(["RTE", "CB", "WiC"]),
        st.integers(0, 3),
        st.sampled_from([0, 0, 1]),
        template=st.sampled_from(["a", "b"]),
        response=st.text(max_size=3),
    ),
    min_size=1,
    max_size=40,
)


@given(rows=rows_of_files, data=st.data())
def test_accuracy_is_that_of_the_definition_with_ties_and_examples_without_a_right_candidate(
    rows: list[Row], data: st.DataObject
) -> None:
    few = st.sampled_from([0.0, 0.25, 0.5])  # so that many tie
    scores = data.draw(st.lists(few, min_size=len(rows), max_size=len(rows)))
    pairs, examples = read_examples(lines_of(rows))
    assert pairs == [(fields["instruction"], fields["response"]) for fields in rows]
    values = worths_of_picks(examples, np.array(scores, np.float32))
    expected = by_definition(rows, scores)
    assert {key: cell.mean for key, cell in average_by_dataset(examples, values).items()} == pytest.approx(expected)
    mean = average_over_datasets(examples, values)
    assert mean.mean == pytest.approx(sum(expected.values()) / len(expected))
    assert 0 <= mean.low <= mean.mean <= mean.high <= 1
    assert mean.count == len({(r["dataset_name"], r["template_name"], r["example_idx"]) for r in rows})


def test_candidates_of_one_example_may_stand_anywhere() -> None:
    rows = [
        choice("RTE", 0, 0),
        choice("CB", 0, 1),
        choice("RTE", 1, 1),
        choice("RTE", 0, 1),
        choice("RTE", 0, 0, template="other"),
    ]
    _, examples = read_examples([lines_of(rows)[0], b"\n", *lines_of(rows)[1:]])
    assert [example.rows for example in examples] == [(0, 3), (1,), (2,), (4,)]
    assert [(example.cluster, example.name) for example in examples[2:]] == [("1", "t, 1"), ("0", "other, 0")]


def test_two_instructions_are_not_one_example() -> None:
    """As where two files, whose examples are numbered from 0, were put together."""
    rows = [choice("RTE", 0, 0), choice("RTE", 0, 1), {**choice("RTE", 0, 1), "instruction": "another"}]
    with pytest.raises(InvalidLine, match=r"line 3: has another instruction than line 1, .* another example_idx"):
        read_examples(lines_of(rows))


def test_the_first_candidate_wins_a_tie_and_an_example_without_a_right_one_is_wrong() -> None:
    examples = [Example("RTE", (0, 1), (1.0, 0.0)), Example("RTE", (2, 3), (0.0, 0.0))]
    picked = worths_of_picks(examples, np.array([0.5, 0.5, 0.9, 0.1], np.float32))
    assert picked.tolist() == [1.0, 0.0]
    assert worths_by_chance(examples).tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": None}, "label must be 0 or 1, got None"),
        ({"label": 0.5}, r"label must be 0 or 1, got 0\.5"),
        ({"label": "1"}, "label must be 0 or 1, got '1'"),
        ({"label": 2}, "label must be 0 or 1, got 2"),
        ({"label": -1}, "label must be 0 or 1, got -1"),
        ({"dataset_name": 3}, "dataset_name must be a str"),
    ],
)
def test_a_line_that_is_not_of_the_protocol_is_named(change: Row, problem: str) -> None:
    with pytest.raises(InvalidLine, match=f"line 2: {problem}"):
        read_examples(lines_of([choice("RTE", 0, 1), {**choice("RTE", 0, 0), **change}]))


@pytest.mark.parametrize("name", ["label", "example_idx", "template_name"])
def test_a_line_without_a_field_is_named(name: str) -> None:
    fields = choice("RTE", 0, 1)
    del fields[name]
    with pytest.raises(InvalidLine, match=f"line 1: has no field '{name}'"):
        read_examples(lines_of([fields]))


def test_the_first_examples_of_each_dataset_are_taken_with_their_pairs() -> None:
    rows = [choice("RTE", place // 2, place % 2, response=str(place)) for place in range(6)] + [choice("CB", 0, 1)]
    pairs, examples = first_examples(*read_examples(lines_of(rows)), 2)
    assert [response for _, response in pairs] == ["0", "1", "2", "3", "r"]
    assert [(example.dataset, example.rows) for example in examples] == [("RTE", (0, 1)), ("RTE", (2, 3)), ("CB", (4,))]
