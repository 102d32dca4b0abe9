"""A run that is ended at the worst moments: by a full disk, by Ctrl-C between two names, by an input that is cut."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from cappy_engine import Scorer, storage
from cappy_engine.bulk.input_files import Files
from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.score_file import score_file
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.errors import CappyError, OutputError
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import WINDOW, Stop, pairs_of, run, stopped, write_rows


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("form", "windows"), [("jsonl", 0), ("jsonl", 2), ("jsonl.gz", 2), ("parquet", 2)])
def test_a_run_goes_on_where_the_disk_was_full_in_the_middle_of_a_window(
    form: str, windows: int, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = (tmp_path / f"{name}.{form}" for name in ("in", "out", "whole"))
    run(scorer, write_rows(source, pairs_of(40)), whole)
    append, left = storage.append, [windows]

    def full(file: BinaryIO, content: bytes) -> None:
        if not left[0]:
            file.write(content[: len(content) // 2])
            file.flush()
            raise full_disk()
        left[0] -= 1
        append(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "append", full)
        with pytest.raises(OutputError, match="No space left on device; go on with --resume once that is mended"):
            run(scorer, source, out)
    run(scorer, source, out, resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_nothing_is_scored_for_long_that_cannot_be_written(
    tmp_path: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, session = write_rows(tmp_path / "in.jsonl", pairs_of(400)), FakeSession()

    def full(file: BinaryIO, content: bytes) -> None:
        raise full_disk()

    monkeypatch.setattr(storage, "append", full)
    with pytest.raises(OutputError):
        run(fake_scorer(session, tokenizer=tokenizer), source, tmp_path / "out.jsonl")
    assert sum(len(batch["input_ids"]) for batch in session.batches) < 100


def test_both_files_have_their_names_after_a_stop_between_them(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out, bad = pairs_of(20), tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    rows[7]["response"] = None
    source, options = write_rows(tmp_path / "in.jsonl", rows), RowOptions("skip", window=WINDOW)
    rename, named = os.rename, list[Path]()

    def interrupted(path: Path, target: Path) -> None:
        if named:
            raise KeyboardInterrupt
        rename(path, target)
        named.extend({target} & {out, bad})

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(scorer, source, out, rejects=bad, options=options)
    run(scorer, source, out, rejects=bad, options=options, resume=True)
    assert [len(path.read_text().splitlines()) for path in (out, bad)] == [19, 1]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_run_that_ended_while_it_took_the_place_of_another_takes_nothing_from_it(
    form: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, whole = (tmp_path / f"{name}.{form}" for name in ("in", "out", "whole"))
    task, replace = ScoreTask(score_field="other"), os.replace
    run(scorer, write_rows(source, pairs_of(40)), whole, task=task)
    stopped(monkeypatch, 3, lambda: run(scorer, source, out))

    def ended(path: Path, target: Path) -> None:
        replace(path, target)
        if target == Names(out).settings:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", ended)
        with pytest.raises(Stop):
            run(scorer, source, out, task=task, force=True)
    run(scorer, source, out, task=task, resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_an_input_that_is_cut_behind_what_was_read_is_an_error(tmp_path: Path, scorer: Scorer) -> None:
    """A window is as long as what is read at once, so that nothing is left of it when the next one is read."""
    row = {"instruction": "Is it so?", "response": "yes", "note": ""}
    line = json.dumps(row).replace(' ""', ' "{}"').encode() + b"\n"
    line = line.replace(b"{}", b"x" * (2**17 + 2 - len(line)))
    source, cut = tmp_path / "in.jsonl", list[Totals]()
    source.write_bytes(line * 100)

    def cut_once(totals: Totals) -> None:
        if not cut:
            cut.append(totals)
            time.sleep(0.2)  # until the reader waits
            os.truncate(source, 8 * len(line))

    files = Files([source], ScoreTask(), RowOptions(window=8))
    with pytest.raises(CappyError, match="changed while it was read"):
        score_file(scorer, files, Target(tmp_path / "out.jsonl"), progress=cut_once)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_came_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    out, another = tmp_path / "out.jsonl", tmp_path / "another"
    out.write_text("old")
    (tmp_path / "same").hardlink_to(out)  # so that it would be written over

    def overtaken(file: BinaryIO) -> None:
        file.write(b"scored")
        another.write_text("another's")
        another.replace(out)

    with pytest.raises(OutputError, match="was replaced meanwhile; move it away"), open_output(out, force=True) as file:
        overtaken(file)
    assert out.read_text() == "another's"
    assert (tmp_path / "out.jsonl.partial").read_text() == "scored"
