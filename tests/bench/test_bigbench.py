"""Cappy's protocol on an LLM's samples: its numbers from the definition, written again in the plainest way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from cappy_bench.quality.bigbench import examples_of, first_of_each, notes_on, read_tasks, ways_without_scores
from cappy_bench.quality.evaluation import Evaluation, describe_rouge, evaluate, evaluation_document
from cappy_engine.errors import CappyError
from tests.support.protocol_rows import GOOD, Row, samples, write

ROUGE = RougeScorer(["rougeL"], use_stemmer=True)


def evaluation_of(source: Path, scores: list[float]) -> Evaluation:
    tasks = read_tasks(source)
    _, examples = examples_of(tasks)
    found = {"fp32": np.array(scores, np.float32)}
    others = ways_without_scores(tasks, examples)
    return evaluate("ROUGE-L", examples, found, others=others, notes=notes_on(tasks))


def by_definition(rows: list[Row], scores: list[float]) -> dict[str, dict[str, float]]:
    """ROUGE-L by way and task, then "mean": strictly greatest wins, so the first of equals does."""
    rows_by_task: dict[str, list[dict[str, float]]] = {}
    place = 0
    for fields in rows:
        worth = []
        for sample in fields["samples"]:
            worth.append(max(ROUGE.score(reference, sample)["rougeL"].fmeasure for reference in fields["references"]))
        totals = fields["log_likelihoods"]
        means = [total / count for total, count in zip(totals, fields["token_counts"], strict=True)]

        def chosen(keys: list[float], worth: list[float] = worth) -> float:
            best = 0
            for candidate, key in enumerate(keys):
                if key > keys[best]:
                    best = candidate
            return worth[best]

        ways = {
            "beam": worth[0],
            "sampling": (worth[1] + worth[2]) / 2,
            "top-k": worth[3],
            "self sum": chosen(totals),
            "self mean": chosen(means),
            "random": sum(worth) / 4,
            "fp32": chosen(scores[place : place + 4]),
            "oracle": max(worth),
        }
        place += 4
        rows_by_task.setdefault(fields["dataset"], []).append(ways)
    found: dict[str, dict[str, float]] = {}
    for way in ("beam", "sampling", "top-k", "self sum", "self mean", "random", "fp32", "oracle"):
        tasks = {task: sum(w[way] for w in examples) / len(examples) for task, examples in rows_by_task.items()}
        found[way] = {**tasks, "mean": sum(tasks.values()) / len(tasks)}
    return found


texts = st.lists(st.sampled_from("The dogs dog were running runs über 42 是".split()), max_size=5).map(" ".join)
few = st.sampled_from([-2.0, -1.0, 0.0])  # so that many tie
rows_of_files = st.lists(
    st.builds(
        samples,
        st.sampled_from(["alpha", "beta"]),
        st.lists(texts, min_size=4, max_size=4),
        st.lists(texts, min_size=1, max_size=3),
        st.lists(few, min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(rows=rows_of_files, data=st.data())
def test_every_figure_is_that_of_the_definition_ties_included(
    rows: list[Row], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scores = data.draw(st.lists(few, min_size=4 * len(rows), max_size=4 * len(rows)))
    found = evaluation_of(write(tmp_path_factory.mktemp("tasks"), rows), scores)
    document = evaluation_document(found)
    shown = {
        way: {**{task: cell["mean"] for task, cell in part["datasets"].items()}, "mean": part["mean"]["mean"]}
        for way, part in document["averages"].items()
    }
    expected = by_definition(rows, scores)
    assert list(shown) == list(expected)
    for way, cells in expected.items():
        assert shown[way] == pytest.approx(cells, abs=1e-12), way
    for way in expected.keys() - {"fp32"}:
        difference = document["differences"][f"fp32 above {way}"]["mean"]
        assert difference == pytest.approx(expected["fp32"]["mean"] - expected[way]["mean"], abs=1e-12)


def test_samples_without_log_likelihoods_have_no_self_score_and_it_is_said(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "log_likelihoods": [-1.0, None, -0.5, -3.0]}]
    found = evaluation_of(write(tmp_path / "tasks", rows), [0.0] * 8)
    assert list(found.ways) == ["beam", "sampling", "top-k", "random", "fp32", "oracle"]
    assert "no self score: 1 of 2 examples have no log-likelihood for all samples" in describe_rouge(found)


def test_plain_samples_of_any_origin_are_enough(tmp_path: Path) -> None:
    plain = {name: GOOD[name] for name in ("instruction", "references", "samples")}
    rows = [plain, {**plain, "samples": ["dogs", "cats"]}]
    found = evaluation_of(write(tmp_path / "tasks", rows, "mine.jsonl"), [0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    assert list(found.ways) == ["random", "fp32", "oracle"]
    assert {example.dataset for example in found.examples} == {"mine"}


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    """macOS leaves ._NAME beside a file on other disks, and editors leave hidden copies."""
    folder = write(tmp_path / "tasks", [GOOD], "mine.jsonl")
    write(folder, [GOOD, GOOD], ".mine.jsonl")
    (folder / "._mine.jsonl").write_bytes(b"\0\5\x16\7")
    assert [entry.name for entry in read_tasks(folder)] == ["mine.jsonl, line 1"]


@pytest.mark.parametrize("name", ["flan-0.8b.jsonl", "flan-0.8b.jsonl.gz", "flan-0.8b"])
def test_a_task_has_the_whole_name_of_its_file(name: str, tmp_path: Path) -> None:
    plain = "".join(json.dumps({key: GOOD[key] for key in ("instruction", "references", "samples")}) + "\n")
    (tmp_path / name).write_bytes(gzip.compress(plain.encode()) if name.endswith(".gz") else plain.encode())
    assert [entry.dataset for entry in read_tasks(tmp_path / name)] == ["flan-0.8b"]


def test_a_decoding_that_not_all_tasks_have_is_not_shown_alone_and_it_is_said(tmp_path: Path) -> None:
    other = {**GOOD, "dataset": "beta", "decodings": ["beam", "beam", "greedy", "top-k"]}
    found = evaluation_of(write(tmp_path / "tasks", [GOOD, other]), [0.0] * 8)
    assert list(found.ways) == ["beam", "top-k", "self sum", "self mean", "random", "fp32", "oracle"]
    assert "not shown alone, since not all tasks have them: greedy, sampling" in describe_rouge(found).splitlines()


def test_examples_that_always_get_nothing_are_counted(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "references": ["是", "über"[:1]]}, {**GOOD, "references": ["是", "the dogs"]}]
    found = evaluation_of(write(tmp_path / "tasks", rows), [0.0] * 12)
    assert "1 of 3 examples have no reference with a word that ROUGE-L reads" in describe_rouge(found)


def test_the_first_examples_of_each_task_are_taken(tmp_path: Path) -> None:
    rows = [{**GOOD, "dataset": task, "example_idx": place} for place, task in enumerate("aabab")]
    tasks = first_of_each(read_tasks(write(tmp_path / "tasks", rows)), 2)
    assert [entry.dataset for entry in tasks] == ["a", "a", "b", "b"]
    assert first_of_each(tasks, None) == tasks
    assert [example.name for example in examples_of(tasks)[1]] == [f"tasks.jsonl, line {n}" for n in (1, 2, 3, 5)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"references": []}, "has no references"),
        ({"references": None}, "needs 'references', a list of strings; found None"),
        ({"samples": []}, "has no samples"),
        ({"samples": ["a"]}, r"decodings must be a list with an entry for each of 1 samples, got \['beam'"),
        (
            {"decodings": ["beam", "beam", "beam", "beam"]},
            r"has the decodings \['beam'\], the task's first example \[",
        ),
        ({"decodings": ["beam", 1, "sampling", "top-k"]}, "decodings must hold str or null, got 1"),
        ({"decodings": ["beam", None, "sampling", "top-k"]}, "has a sample without a decoding"),
        ({"log_likelihoods": [0.5]}, "log_likelihoods must be a list with an entry for each of 4 samples"),
        ({"log_likelihoods": [0.5, "x", 1, 2]}, "log_likelihoods must hold float or null, got 'x'"),
        ({"log_likelihoods": [float("nan"), 1, 1, 2]}, "not JSON .NaN is not a value of JSON"),
        (
            {"log_likelihoods": [-1, -(10**400), -1, -1]},
            "log_likelihoods must hold numbers of at most 64 bits, got -1000",
        ),
        ({"token_counts": [1, 1, 0, 1]}, "token_counts must be at least 1, got 0"),
        ({"token_counts": [1, 10**400, 1, 1]}, "token_counts must hold numbers of at most 64 bits, got 1000"),
        ({"dataset": 3}, "dataset must be a string, got 3"),
        ({"decodings": ["beam", "fp32", "x", "y"]}, "a decoding is called 'fp32', as a column of the table is"),
        ({"decodings": ["self sum", "a", "a", "b"]}, "a decoding is called 'self sum', as a column"),
        ({"decodings": ["a", "b", "PyTorch", "c"]}, "a decoding is called 'PyTorch', as a column"),
        ({"decodings": ["a", "b", "c", "oracle"]}, "a decoding is called 'oracle', as a column"),
        ({"instruction": 3}, "instruction must be a str"),
    ],
)
def test_a_line_that_is_not_of_the_form_is_named(change: Row, problem: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", [GOOD, {**GOOD, **change}])
    with pytest.raises(CappyError, match=rf"tasks\.jsonl, line 2: {problem}"):
        read_tasks(folder)


def test_a_folder_may_hold_packed_files_but_no_task_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", [GOOD])
    other = {**GOOD, "dataset": "beta"}
    (folder / "beta.jsonl.gz").write_bytes(gzip.compress(json.dumps(other).encode()))
    assert {entry.dataset for entry in read_tasks(folder)} == {"alpha", "beta"}
    write(folder, [GOOD], "zeta.jsonl")
    with pytest.raises(CappyError, match=r"the task 'alpha' is in .*tasks\.jsonl and in .*zeta\.jsonl"):
        read_tasks(folder)


def test_an_unfinished_file_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", [GOOD])
    (folder / "beta.jsonl.partial").touch()
    said: list[str] = []
    read_tasks(folder, say=said.append)
    assert len(said) == 1
    assert "beta.jsonl.partial: it is not finished" in said[0]


def test_files_of_another_kind_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "tasks", [GOOD])
    for name in ("beta.json", "gamma.jsonl.zst", "tasks.jsonl.settings.json", ".DS_Store"):
        (folder / name).touch()
    (folder / "more").mkdir()
    said: list[str] = []
    assert len(read_tasks(folder, say=said.append)) == 1
    assert said == [
        f"leaving out {folder / name}: only files *.jsonl and *.jsonl.gz are read"
        for name in ("beta.json", "gamma.jsonl.zst", "more")
    ]


def test_a_folder_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CappyError, match=r"holds no file \*\.jsonl or \*\.jsonl\.gz"):
        read_tasks(tmp_path)
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(CappyError, match="holds no examples"):
        read_tasks(tmp_path)
