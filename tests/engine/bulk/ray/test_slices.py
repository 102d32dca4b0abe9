"""Slices of Parquet files cover every row once, and a folder of them is complete, or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.folders import Folder, files_of_folder
from cappy_engine.bulk.ray.slice_folder import (
    MOST_TRIES,
    SliceDone,
    count_try,
    describe_job,
    finish_folder,
    note_done,
    open_folder,
    read_done,
)
from cappy_engine.bulk.ray.slices import Slice, cut_slices, score_slice
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.bundle import EMBEDDED
from cappy_engine.errors import CappyError, InvalidLine, OutputError
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import run, write_in_tick

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")


def write(path: Path, rows: int, *, group: int = 3, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": range(rows), "instruction": [f"q{row}" for row in range(rows)], "response": ["Yes"] * rows, **more}
    table = pa.table({name: list(values) for name, values in columns.items()})
    pq.write_table(table.replace_schema_metadata({"kept": "yes"}), path, row_group_size=group)
    return path


def folder_of(source: Path, **options: Any) -> Folder:
    files = files_of_folder(source) if source.is_dir() else [(source, Path(source.name))]
    return Folder(files, source.parent / "out", options=RowOptions(window=2, **options))


def described(
    source: Path, bundle: Path = EMBEDDED, rejected: Path | None = None, too_long: str = "truncate", **options: Any
) -> dict[str, Any]:
    task, nodes = ScoreTask(**options.pop("task", {})), BundleOfNodes.of(bundle, ScorerOptions(**options))
    folder = dataclasses.replace(folder_of(source, too_long=too_long), task=task)
    return describe_job(cut_slices(folder, 4), nodes, folder, rejected)


# Slices


@pytest.mark.parametrize("group", [1, 3, 4, 5, 100])
def test_slices_hold_every_row_once_and_as_one_run_writes_it_whatever_the_row_groups_are(
    tmp_path: Path, scorer: Scorer, group: int
) -> None:
    source = write(tmp_path / "in" / "a.parquet", 10, group=group)
    folder = folder_of(source.parent)
    slices = cut_slices(folder, 4)
    assert [(part.start, part.rows, part.out) for part in slices] == [
        (0, 4, "a-00000.parquet"), (4, 4, "a-00001.parquet"), (8, 2, "a-00002.parquet"),
    ]  # fmt: skip
    totals = Totals()
    for part in reversed(slices):
        totals.add(score_slice(scorer, part, folder))
    table = pa.concat_tables([pq.read_table(folder.out / part.out) for part in slices])
    expected = run(scorer, source, tmp_path / "one.parquet", options=folder.options)
    assert table.equals(pq.read_table(tmp_path / "one.parquet"))
    assert table["id"].to_pylist() == list(range(10))
    assert table.schema.metadata[b"kept"] == b"yes"
    assert (totals.pairs, totals.tokens) == (expected.pairs, expected.tokens)


def test_a_folder_keeps_its_files_names_and_files_without_rows(tmp_path: Path, scorer: Scorer) -> None:
    write(tmp_path / "in" / "b.parquet", 2)
    write(tmp_path / "in" / "sub" / "a.pq", 0)
    folder = folder_of(tmp_path / "in")
    slices = cut_slices(folder)
    assert [part.out for part in slices] == ["b.parquet", "sub/a.pq"]
    for part in slices:
        score_slice(scorer, part, folder)
    assert pq.read_table(folder.out / "sub" / "a.pq").schema.names == [
        "id", "instruction", "response", "score", "score_truncated",
    ]  # fmt: skip


def test_candidates_are_ranked_in_slices_too(tmp_path: Path, scorer: Scorer) -> None:
    source = write(tmp_path / "a.parquet", 5, candidates=[["Yes", "No", "Perhaps"]] * 5)
    folder = Folder([(source, Path("a.parquet"))], tmp_path / "out", RankTask())
    totals = [score_slice(scorer, part, folder) for part in cut_slices(folder, 3)]
    assert [each.pairs for each in totals] == [9, 6]
    assert pq.read_table(tmp_path / "out" / "a-00001.parquet").num_rows == 2


def test_long_rows_make_small_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cappy_engine.bulk.ray.slices.SLICE_BYTES", 2**16)
    source = write(tmp_path / "a.parquet", 8, long=[str(row) * 2**15 for row in range(8)])
    assert max(part.rows for part in cut_slices(folder_of(source))) <= 2


@pytest.mark.parametrize(
    ("more", "task", "problem"),
    [
        ({}, ScoreTask("question"), "a.parquet has no column 'question'; found 'id', 'instruction', 'response'"),
        ({"score": [1]}, ScoreTask(), "a.parquet has a column 'score' already; choose another with --score-field"),
        ({"response": [7]}, ScoreTask(), "a.parquet: the column 'response' holds int64, and must hold texts"),
    ],
)
def test_files_without_the_columns_are_refused(tmp_path: Path, more: Any, task: ScoreTask, problem: str) -> None:
    files = [(write(tmp_path / "a.parquet", 1, **more), Path("a.parquet"))]
    with pytest.raises(CappyError, match=re.escape(problem)):
        cut_slices(Folder(files, tmp_path / "out", task))


def test_what_is_not_parquet_and_names_that_would_be_there_twice_are_refused(tmp_path: Path) -> None:
    torn = tmp_path / "in" / "torn.parquet"
    torn.parent.mkdir()
    torn.write_bytes(b"PAR1 and so on")
    with pytest.raises(CappyError, match=r"torn.parquet is not a complete Parquet file"):
        cut_slices(folder_of(torn.parent))
    torn.rename(torn.with_name("torn.csv.gz"))
    with pytest.raises(CappyError, match=r"torn.csv.gz is CSV, and a cluster takes Parquet only"):
        cut_slices(folder_of(torn.parent))
    torn.with_name("torn.csv.gz").unlink()
    write(torn.parent / "a.parquet", 9)
    write(torn.parent / "a-00001.parquet", 1)
    with pytest.raises(CappyError, match=r"would become a-00001.parquet; rename one"):
        cut_slices(folder_of(torn.parent), 4)


def test_a_bad_row_is_named_and_nothing_is_written(tmp_path: Path, scorer: Scorer) -> None:
    source = write(tmp_path / "a.parquet", 6, response=["Yes"] * 5 + [None])
    folder = folder_of(source)
    with pytest.raises(InvalidLine, match=r"a.parquet, row 6: response must be a str, got NoneType"):
        score_slice(scorer, cut_slices(folder, 4)[1], folder)
    assert not folder.out.exists()


def test_bad_rows_are_left_out_and_listed_in_a_folder(tmp_path: Path, scorer: Scorer) -> None:
    source = write(tmp_path / "a.parquet", 6, response=["Yes", None, "Yes", "Yes", "Yes", None])
    folder = folder_of(source, on_error="skip")
    slices = cut_slices(folder, 3)
    totals = [score_slice(scorer, part, folder, tmp_path / "bad") for part in slices]
    assert [(each.pairs, each.refused) for each in totals] == [(2, 1), (2, 1)]
    assert [pq.read_table(folder.out / part.out)["id"].to_pylist() for part in slices] == [[0, 2], [3, 4]]
    listed = (tmp_path / "bad" / "a-00001.parquet.rejects.jsonl").read_text()
    assert json.loads(listed)["row"] == 6


def test_a_file_that_changed_or_is_another_one_on_a_node_is_not_scored(tmp_path: Path, scorer: Scorer) -> None:
    source = write(tmp_path / "a.parquet", 6)
    folder = folder_of(source)
    part = cut_slices(folder, 4)[1]
    write(source, 6, response=["Noo"] * 6)
    with pytest.raises(
        CappyError, match=r"a.parquet is not the file that the job began with: it has .*, and had .*; do"
    ):
        score_slice(scorer, part, folder)


def test_a_file_that_was_changed_behind_the_same_footer_is_not_scored(tmp_path: Path, scorer: Scorer) -> None:
    source = write(tmp_path / "a.parquet", 4, response=["Yes", "No.", "Hm.", "Aha"], group=4)
    os.utime(source, (0, 0))  # the change may come within a millisecond
    folder, content = folder_of(source), source.read_bytes()
    part = cut_slices(folder, 4)[0]
    source.write_bytes(content.replace(b"No.", b"Hm!").replace(b"Hm.", b"No."))
    assert source.read_bytes()[-500:] == content[-500:]
    with pytest.raises(CappyError, match=r"a.parquet is not the file that the job began with: it has .*, and had .*"):
        score_slice(scorer, part, folder)


def test_a_file_that_is_written_again_within_a_tick_of_the_clock_is_not_scored(tmp_path: Path, scorer: Scorer) -> None:
    source = write(tmp_path / "a.parquet", 4)
    folder, content = folder_of(source), source.read_bytes()
    for _ in range(10):
        write_in_tick(source, content)
        part = cut_slices(folder, 4)[0]
        write_in_tick(source, content)
        with pytest.raises(CappyError, match=r"a.parquet is not the file that the job began with: it has .*, and had"):
            score_slice(scorer, part, folder)


def test_a_file_that_is_written_to_while_a_slice_is_read_is_an_error(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source = write(tmp_path / "a.parquet", 100, group=2)
    folder, content = folder_of(source), source.read_bytes()

    def score(ids: Sequence[int]) -> float:
        source.write_bytes(content)
        return 0.5

    part = cut_slices(folder)[0]
    with pytest.raises(CappyError, match=r"a.parquet changed while it was read; put back what it was"):
        score_slice(fake_scorer(FakeSession(score), tokenizer=tokenizer), part, folder)
    assert not folder.out.exists()


# The folder of results


def test_a_folder_has_its_name_when_all_slices_are_there(tmp_path: Path, scorer: Scorer) -> None:
    source, target = write(tmp_path / "a.parquet", 6), tmp_path / "out"
    folder, job = folder_of(source), described(source)
    slices = cut_slices(folder, 4)
    done: dict[str, SliceDone] = {}

    def score(part: Slice, unfinished: Path) -> None:
        into = Folder((), unfinished)
        done[part.out] = note_done(unfinished, part, score_slice(scorer, part, into))

    with open_folder(target, job, resume=False) as unfinished:
        score(slices[0], unfinished)
        with pytest.raises(OutputError, match=r"lacks 1 of 2 files, the first is a-00001.parquet; do all nodes see"):
            finish_folder(unfinished, target, slices, done)
        with pytest.raises(OutputError, match="another process works on"), open_folder(target, job, resume=True):
            pass
    with (
        pytest.raises(OutputError, match="is of a job that runs or was stopped; go on with --resume"),
        open_folder(target, job, resume=False),
    ):
        pass
    with open_folder(target, job, resume=True) as unfinished:
        assert [read_done(unfinished, part) for part in slices] == [done[slices[0].out], None]
        score(slices[1], unfinished)
        (unfinished / ".a-00001.parquet-1a2b").write_bytes(b"half of a slice")
        finish_folder(unfinished, target, slices, done)
    assert sorted(path.name for path in target.iterdir()) == [part.out for part in slices]
    assert not unfinished.exists()
    with pytest.raises(OutputError, match="already, so it is complete"), open_folder(target, job, resume=True):
        pass


def test_a_slice_whose_file_is_gone_or_another_one_is_scored_again(tmp_path: Path) -> None:
    part = Slice("a.parquet", "", 0, 6, "a.parquet", 1)
    (tmp_path / "a.parquet").write_bytes(b"scored")
    done = note_done(tmp_path, part, Totals(pairs=6))
    assert read_done(tmp_path, part) == done
    (tmp_path / "a.parquet").write_bytes(b"torn")
    assert read_done(tmp_path, part) is None
    (tmp_path / "a.parquet").unlink()
    assert read_done(tmp_path, part) is None


def test_another_job_is_not_gone_on_with(tmp_path: Path, bundle: Path) -> None:
    source, target = write(tmp_path / "a.parquet", 6), tmp_path / "out"

    def go_on(job: dict[str, Any]) -> Path:
        with open_folder(target, job, resume=True) as unfinished:
            return unfinished

    folder = go_on(described(source))
    others: dict[str, list[Any]] = {"precision": ["int8"], "device": ["cpu"], "max_text_chars": [9], "bundle": [bundle],
        "too_long": ["refuse"], "task": [{"score_field": "other"}, {"activation": "sigmoid"}]}  # fmt: skip
    for name, value in [(name, value) for name, values in others.items() for value in values]:
        with pytest.raises(OutputError, match=rf"another job: not the same {name.replace('task', 'columns')}; remove"):
            go_on(described(source, **{name: value}))
    go_on(described(source, rejected=tmp_path / "bad"))  # may be added
    with pytest.raises(OutputError, match=r"is of another job: not the same rejects; remove"):
        go_on(described(source))
    write(source, 7)
    with pytest.raises(OutputError, match=r"is of another job: not the same input and rejects; remove"):
        go_on(described(source))
    (folder / ".job.json").write_text("[")
    with pytest.raises(OutputError, match="is not of a job that can be resumed"):
        go_on(described(source))


def test_bad_rows_go_to_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    job = described(write(tmp_path / "a.parquet", 6), rejected=tmp_path / "bad")
    with pytest.raises(OutputError, match=r"bad exists already; bad rows go to a new folder"):
        open_folder(tmp_path / "out", job, resume=False).__enter__()
    assert not (tmp_path / "out.partial").exists()


def test_a_slice_that_loses_its_worker_again_and_again_ends_the_job(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", 6)
    part = cut_slices(folder_of(source), 4)[1]
    with open_folder(tmp_path / "out", described(source), resume=False) as folder:
        for _ in range(MOST_TRIES):
            count_try(folder, part)
        with pytest.raises(CappyError, match=r"a.parquet, rows 5 to 6: the worker was lost 5 times"):
            count_try(folder, part)
    with open_folder(tmp_path / "out", described(source), resume=True) as folder:
        count_try(folder, part)
