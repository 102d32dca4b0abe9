"""Cappy's zero-shot protocol: the numbers of its definition, written again in the plainest way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

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
from cappy_engine.cli.main import main
from cappy_engine.errors import InvalidLine
from cappy_export import ExportOptions, export
from tests.support.places import DATA, MINI

Row = dict[str, Any]


def row(dataset: str, index: int, label: object, *, template: str = "t", response: str = "r") -> Row:
    return {
        "dataset_name": dataset,
        "template_name": template,
        "example_idx": index,
        "instruction": f"{dataset} {template} {index}",
        "response": response,
        "label": label,
    }


def lines_of(rows: list[Row]) -> list[bytes]:
    return [json.dumps(fields).encode() for fields in rows]


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
        row,
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
    rows = [row("RTE", 0, 0), row("CB", 0, 1), row("RTE", 1, 1), row("RTE", 0, 1), row("RTE", 0, 0, template="other")]
    _, examples = read_examples([lines_of(rows)[0], b"\n", *lines_of(rows)[1:]])
    assert [example.rows for example in examples] == [(0, 3), (1,), (2,), (4,)]
    assert [(example.cluster, example.name) for example in examples[2:]] == [("1", "t, 1"), ("0", "other, 0")]


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
        ({"dataset_name": 3}, "dataset_name must be a str"),
    ],
)
def test_a_line_that_is_not_of_the_protocol_is_named(change: Row, problem: str) -> None:
    with pytest.raises(InvalidLine, match=f"line 2: {problem}"):
        read_examples(lines_of([row("RTE", 0, 1), {**row("RTE", 0, 0), **change}]))


@pytest.mark.parametrize("name", ["label", "example_idx", "template_name"])
def test_a_line_without_a_field_is_named(name: str) -> None:
    fields = row("RTE", 0, 1)
    del fields[name]
    with pytest.raises(InvalidLine, match=f"line 1: has no field '{name}'"):
        read_examples(lines_of([fields]))


def test_the_first_examples_of_each_dataset_are_taken_with_their_pairs() -> None:
    rows = [row("RTE", place // 2, place % 2, response=str(place)) for place in range(6)] + [row("CB", 0, 1)]
    pairs, examples = first_examples(*read_examples(lines_of(rows)), 2)
    assert [response for _, response in pairs] == ["0", "1", "2", "3", "r"]
    assert [(example.dataset, example.rows) for example in examples] == [("RTE", (0, 1)), ("RTE", (2, 3)), ("CB", (4,))]


@pytest.fixture
def some_file(tmp_path: Path) -> Path:
    words = ["Yes", "No", "It depends on the weather", "maybe"]
    rows = [
        row("RTE" if place < 40 else "CB", place // 4, int(place % 4 == place // 4 % 4), response=words[place % 4])
        for place in range(80)
    ]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join(lines_of(rows)))
    return tmp_path / "some.jsonl"


def test_the_command_compares_precisions_with_pytorch(
    some_file: Path, bundle: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--bundle", str(bundle), "--against", str(checkpoint)]
    assert main([*command, "--precision", "fp32", "--precision", "int8"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["dataset", "examples", "chance", "PyTorch", "fp32", "int8"]
    assert [line.split()[:3] for line in shown.splitlines()[1:4]] == [
        ["RTE", "10", "25.0"],
        ["CB", "10", "25.0"],
        ["mean", "20", "25.0"],
    ]
    assert "fp32 against PyTorch: the same decision in 20 of 20 examples (100.00%)" in shown
    assert "int8 against PyTorch: the same decision in" in shown


def test_the_command_gives_the_same_as_json(some_file: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--bundle", str(bundle), "--json", "--examples", "3"]
    assert main([*command, "--precision", "fp32", "--precision", "fp16"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["averages"]["fp32"]["mean"]["count"] == 6
    assert document["agreement"]["fp16 against fp32"]["examples"] == 6


def test_pytorch_cuts_pairs_where_the_bundle_does(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, tmp_path / "short", ExportOptions(max_length=24))
    words = "the sky is blue or green and nobody knows why it was so long ago".split()
    rows = [
        {**row("RTE", place // 4, int(place % 4 == 0), response=" ".join(words[place % 13 :] * 3) + words[place % 7])}
        | {"instruction": " ".join(words[place // 4 % 13 :] * 4)}
        for place in range(80)
    ]
    (tmp_path / "long.jsonl").write_bytes(b"\n".join(lines_of(rows)))
    command = ["evaluate", "promptsource", str(tmp_path / "long.jsonl"), "--bundle", str(tmp_path / "short")]
    assert main([*command, "--against", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["fp32 against PyTorch"]["share"] == 1


def test_a_precision_that_the_bundle_lacks_is_found_before_anything_is_scored(
    some_file: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--against", str(checkpoint)]
    assert main([*command, "--precision", "int8", "--precision", "fp32"]) == 1
    err = capsys.readouterr().err
    assert "has no fp32 model for cpu, only int8" in err
    assert "threads" not in err
    assert "scoring" not in err


def test_a_revision_of_no_checkpoint_is_wrong_usage(some_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for protocol in ("promptsource", "bigbench"):
        assert main(["evaluate", protocol, str(some_file), "--revision", "main"]) == 2
        assert "--revision is the CHECKPOINT's of --against, which is not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before", [["evaluate", "--verbose", "promptsource"], ["evaluate", "promptsource", "--verbose"]]
)
def test_verbose_may_stand_before_and_after_the_protocol(
    before: list[str], some_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*before, str(some_file)]) == 0
    assert "batches of up to" in capsys.readouterr().err
    assert main(["evaluate", "promptsource", str(some_file)]) == 0
    assert "batches of up to" not in capsys.readouterr().err


def test_an_empty_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert main(["evaluate", "promptsource", str(tmp_path / "empty.jsonl")]) == 1
    assert "holds no examples" in capsys.readouterr().err


@pytest.mark.slow
def test_on_trained_weights_and_real_tasks_fp32_decides_as_pytorch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = DATA / "promptsource_test.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"needs {source}")
    (tmp_path / "tasks.jsonl").write_bytes(gzip.decompress(source.read_bytes()))
    export(MINI, tmp_path / "bundle", ExportOptions(precisions=("fp32", "int8")))
    command = ["evaluate", "promptsource", str(tmp_path / "tasks.jsonl"), "--bundle", str(tmp_path / "bundle")]
    assert main([*command, "--against", str(MINI), "--precision", "fp32", "--examples", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["averages"]["PyTorch"]["datasets"]) == 11
    assert document["agreement"]["fp32 against PyTorch"]["share"] == 1
