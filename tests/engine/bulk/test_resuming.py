"""A run that was killed goes on to the same bytes as one that was not, with every row once."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.resume import partial_file
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.errors import InvalidLine, OutputError
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import WINDOW, Stop, killed, pairs_of, run, slow_scorer, stopped, write_rows

FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet"]


def source_of(folder: Path, form: str, *, rows: int = 60, bad: tuple[int, ...] = ()) -> Path:
    """A file of rows, some of them without a response."""
    if form in ("parquet", "jsonl.zst"):
        pytest.importorskip("pyarrow")
    found = pairs_of(rows)
    for number in bad:
        found[number]["response"] = None
    return write_rows(folder / f"in.{form}", found)


def change_a_late_row(source: Path) -> None:
    content = source.read_bytes()
    source.write_bytes(content[:-20] + b"X" + content[-19:])


def stop(*args: object) -> None:
    raise Stop


CHANGES: list[tuple[str, Callable[[Path], object], dict[str, Any]]] = [
    (r"input\.in\.jsonl was \d+ bytes, sha256 \w+, is \d+ bytes", change_a_late_row, {}),
    ("score_field was score, is other", lambda source: None, {"task": ScoreTask(score_field="other")}),
    ("window was 8, is 9", lambda source: None, {"options": RowOptions(window=9)}),
    ("too_long was truncate, is refuse", lambda source: None, {"options": RowOptions("stop", "refuse", window=8)}),
    ("max_line_bytes was 16777216, is 999", lambda source: None, {"options": RowOptions(max_line_bytes=999, window=8)}),
]


# Kill -9


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    form: str, tmp_path: Path, tokenizer: PairTokenizer
) -> None:
    source = source_of(tmp_path, form, rows=120)
    out, whole = tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    run(slow_scorer(tokenizer), source, whole)
    chance = random.Random(form)
    kills = 0
    while kills < 20 and not out.exists():
        kills += killed(
            lambda: run(slow_scorer(tokenizer, 0.002), source, out, resume=True, say=lambda text: None),
            chance.uniform(0.0, 0.06),
        )
    if not out.exists() or Names(out).progress.exists():  # or it was killed behind the rename
        run(slow_scorer(tokenizer), source, out, resume=True)
    assert kills > 3
    assert out.read_bytes() == whole.read_bytes()
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".cappy-")}  # probes of folders
    assert left == {source.name, out.name, whole.name}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("commits", [0, 1, 3])
def test_what_was_written_behind_the_last_mark_is_written_again(
    form: str, commits: int, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = source_of(tmp_path, form), tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    run(scorer, source, whole)
    stopped(monkeypatch, commits, lambda: run(scorer, source, out))
    partial = Names(out).partial
    if partial.exists():
        with partial.open("ab") as file:
            file.write(b'{"torn')
    totals = run(scorer, source, out, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert (totals.pairs, totals.pairs_before) == (60, max(0, commits - 1) * WINDOW)
    assert not partial.exists()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("is_copied", [False, True])
def test_a_kill_between_the_last_mark_and_the_rename_is_noticed(
    is_copied: bool, form: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = source_of(tmp_path, form), tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    run(scorer, source, whole)
    with monkeypatch.context() as patch:
        patch.setattr(partial_file.Growing, "finish", stop)
        with pytest.raises(Stop):
            run(scorer, source, out)
    assert not out.exists()
    if is_copied:  # to another disk, or the disk was mounted anew: numbers of files are others
        partial = Names(out).partial
        shutil.copy(partial, tmp_path / "copy")
        (tmp_path / "copy").replace(partial)
    run(scorer, source, out, resume=True)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("is_copied", [False, True])
def test_a_kill_behind_the_rename_leaves_a_complete_file_that_resume_accepts(
    is_copied: bool, form: str, tmp_path: Path, scorer: Scorer
) -> None:
    source, out = source_of(tmp_path, form), tmp_path / f"out.{form}"
    with pytest.raises(Stop):
        run(scorer, source, out, done=stop)
    if is_copied:
        shutil.copy(out, tmp_path / "copy")
        (tmp_path / "copy").replace(out)
    said: list[str] = []
    totals = run(scorer, source, out, resume=True, say=said.append)
    assert said == [f"{out} is complete already"]
    assert (totals.pairs, totals.pairs_before) == (60, 60)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


@pytest.mark.parametrize("form", FORMATS)
def test_a_complete_file_that_is_gone_is_written_again(form: str, tmp_path: Path, scorer: Scorer) -> None:
    source, out = source_of(tmp_path, form), tmp_path / f"out.{form}"
    with pytest.raises(Stop):
        run(scorer, source, out, done=stop)
    whole = out.read_bytes()
    out.unlink()
    assert run(scorer, source, out, resume=True).pairs_before == 0
    assert out.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


@pytest.mark.parametrize(("problem", "change", "others"), CHANGES)
def test_a_complete_file_of_another_run_is_not_taken_for_this_one(
    problem: str, change: Callable[[Path], object], others: dict[str, Any], tmp_path: Path, scorer: Scorer
) -> None:
    source, out = source_of(tmp_path, "jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(Stop):
        run(scorer, source, out, done=stop)
    before = out.read_bytes()
    change(source)
    with pytest.raises(OutputError, match=rf"out\.jsonl was written by another run \(.*{problem}"):
        run(scorer, source, out, resume=True, **others)
    assert out.read_bytes() == before
    run(scorer, source, out, resume=True, force=True, **others)
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


def test_resume_begins_where_nothing_is_there(tmp_path: Path, scorer: Scorer) -> None:
    source, out = source_of(tmp_path, "jsonl"), tmp_path / "out.jsonl"
    assert run(scorer, source, out, resume=True).pairs == 60
    with pytest.raises(OutputError, match=r"out\.jsonl exists, .*: it is complete already, or not of this run; choose"):
        run(scorer, source, out, resume=True)


def test_without_resume_a_stopped_run_is_not_touched(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = source_of(tmp_path, "jsonl"), tmp_path / "out.jsonl"
    stopped(monkeypatch, 3, lambda: run(scorer, source, out))
    before = Names(out).partial.read_bytes()
    with pytest.raises(OutputError, match="go on with --resume, or replace it with --force"):
        run(scorer, source, out)
    assert Names(out).partial.read_bytes() == before
    run(scorer, source, out, force=True)
    assert out.exists()


# What must be as the run began


@pytest.mark.parametrize(("problem", "change", "others"), CHANGES)
def test_a_changed_input_or_option_is_refused(
    problem: str, change: Callable[[Path], object], others: dict[str, Any],
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, out = source_of(tmp_path, "jsonl"), tmp_path / "out.jsonl"
    stopped(monkeypatch, 3, lambda: run(scorer, source, out))
    before = Names(out).partial.read_bytes()
    change(source)
    with pytest.raises(OutputError, match=f"belongs to another run .*{problem}"):
        run(scorer, source, out, resume=True, **others)
    assert Names(out).partial.read_bytes() == before


def test_another_bundle_or_batch_size_is_refused(
    tmp_path: Path, bundle: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = source_of(tmp_path, "jsonl", rows=20), tmp_path / "out.jsonl"
    with Scorer.open(bundle, precision="int8", threads=1) as scorer:
        stopped(monkeypatch, 2, lambda: run(scorer, source, out))
    others: list[tuple[Any, dict[str, Any], str]] = [
        (bundle, {"precision": "fp32", "threads": 1}, "scorer.precision was int8, is fp32"),
        (bundle, {"precision": "int8", "threads": 1, "max_text_chars": 9}, "max_text_chars was 1000000, is 9"),
        (bundle, {"precision": "int8", "threads": 1, "max_batch_tokens": 99}, "max_batch_tokens was 512, is 99"),
        (None, {"threads": 1}, "scorer.bundle was manifest sha256"),
    ]
    for path, options, problem in others:
        scorer = Scorer.open(**({"bundle": path} if path else {}), **options)
        with scorer, pytest.raises(OutputError, match=problem):
            run(scorer, source, out, resume=True)


def test_a_pipe_is_not_taken_for_a_file_without_rows(tmp_path: Path, scorer: Scorer) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for sources in ([tmp_path / "pipe.jsonl"], [source_of(tmp_path, "jsonl"), tmp_path / "pipe.jsonl"]):
        with pytest.raises(OSError, match=r"not a regular file: .*pipe\.jsonl"):
            run(scorer, sources, tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "pipe.jsonl"}


# Bad rows


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rejects_are_there_once_however_often_a_run_is_stopped(
    form: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path, form, bad=(3, 20, 21, 40, 59))
    out, whole = tmp_path / f"out.{form}", tmp_path / f"whole.{form}"
    skip = RowOptions("skip", window=WINDOW)
    run(scorer, source, whole, options=skip, rejects=tmp_path / "whole.bad")
    for commits in (2, 1, 2):
        stopped(
            monkeypatch,
            commits,
            lambda: run(scorer, source, out, options=skip, rejects=tmp_path / "out.bad", resume=True),
        )
    totals = run(scorer, source, out, options=skip, rejects=tmp_path / "out.bad", resume=True)
    assert (totals.pairs, totals.refused) == (55, 5)
    assert out.read_bytes() == whole.read_bytes()
    rejects = [json.loads(line) for line in (tmp_path / "out.bad").read_text().splitlines()]
    assert [each["row" if form == "parquet" else "line"] for each in rejects] == [4, 21, 22, 41, 60]
    assert rejects[0]["error"] == "response must be a str, got NoneType None"
    assert (tmp_path / "out.bad").read_bytes() == (tmp_path / "whole.bad").read_bytes()


def test_a_run_stopped_by_a_bad_row_goes_on_with_rejects_to_the_same_bytes(tmp_path: Path, scorer: Scorer) -> None:
    source = source_of(tmp_path, "jsonl", bad=(21,))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(InvalidLine, match=r"^line 22: response must be a str"):
        run(scorer, source, out)
    assert len(Names(out).partial.read_bytes().splitlines()) == 21
    skip = RowOptions("skip", window=WINDOW)
    run(scorer, source, out, options=skip, rejects=tmp_path / "bad", resume=True)
    run(scorer, source, whole, options=skip, rejects=tmp_path / "whole.bad")
    assert out.read_bytes() == whole.read_bytes()


# Ranking, several files


def test_ranking_goes_on_too(tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"q {n}", "candidates": ["word " * (n * k % 7) for k in range(3)]} for n in range(30)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(scorer, source, whole, task=RankTask())
    stopped(monkeypatch, 4, lambda: run(scorer, source, out, task=RankTask()))
    run(scorer, source, out, task=RankTask(), resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_several_files_into_one_go_on_within_the_file_that_was_read(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_rows(tmp_path / f"{number}.csv", pairs_of(20)) for number in range(3)]
    out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    run(scorer, sources, whole)
    stopped(monkeypatch, 5, lambda: run(scorer, sources, out))
    assert run(scorer, sources, out, resume=True).pairs_before == 28
    assert out.read_bytes() == whole.read_bytes()
    assert len(out.read_text().splitlines()) == 61


def test_a_device_that_fails_leaves_a_run_to_go_on_with(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    source, out, whole = source_of(tmp_path, "jsonl"), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(fake_scorer(tokenizer=tokenizer), source, whole)
    said: list[str] = []
    with pytest.raises(Exception, match="told to fail"):
        run(fake_scorer(FakeSession(fails_at=3), tokenizer=tokenizer), source, out, say=said.append)
    assert said == [f"what was written before this is in {out}.partial; go on with --resume"]
    run(fake_scorer(tokenizer=tokenizer), source, out, resume=True)
    assert out.read_bytes() == whole.read_bytes()
