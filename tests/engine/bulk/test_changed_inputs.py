"""An input that changes while it is read is an error: its output is never taken for a complete one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.input_files import Files
from cappy_engine.bulk.resume.identity import BLOCK_BYTES, BLOCKS, fingerprint
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.score_file import score_file, score_to
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.errors import CappyError, OutputError
from tests.support.bulk_files import run, stopped, write_in_tick, write_rows

ROWS = [{"instruction": f"Is it {number}?", "response": "yes", "note": os.urandom(3000).hex()} for number in range(200)]
"""Long rows: few of them are read ahead."""
OPTIONS = RowOptions(window=8)
CHANGED = "{} changed while it was read; put back what it was and go on, or start anew"


def once(change: Callable[[], object]) -> Callable[[Totals], None]:
    """Make a change when the first batch is scored."""
    left = [change]

    def tell(totals: Totals) -> None:
        if left:
            left.pop()()

    return tell


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(path.read_bytes()[:1])
    os.utime(path, ns=(0, 0))


def test_a_file_that_is_written_again_within_a_tick_of_the_clock_has_another_state(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    for _ in range(10):
        write_in_tick(source, b"{}")
        before = Files([source], ScoreTask()).states()
        write_in_tick(source, b"[]")
        assert Files([source], ScoreTask()).states() != before


@pytest.mark.slow
@pytest.mark.parametrize("change", [cut, append, write_over])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_an_input_that_changes_while_it_is_read_is_an_error_and_resume_goes_on_with_the_old_one(
    form: str, change: Callable[[Path], None], tmp_path: Path, scorer: Scorer
) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    source, out, whole = write_rows(tmp_path / f"in.{form}", ROWS), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    content, files = source.read_bytes(), Files([source], ScoreTask(), OPTIONS)
    score_file(scorer, files, Target(whole))
    for on_error in ("stop", "skip"):
        options = RowOptions(on_error, window=8)
        with pytest.raises(CappyError, match=f"^{re.escape(CHANGED.format(source))}$"):
            score_file(
                scorer, Files([source], ScoreTask(), options), Target(out), progress=once(lambda: change(source))
            )
        assert not out.exists()
        assert 0 < len(Names(out).partial.read_bytes().splitlines()) < 150
        if change is not write_over:
            problem = r"belongs to another run \(input\.in.* was \d+ bytes|is not a complete Parquet file"
            with pytest.raises(CappyError, match=problem):
                score_file(scorer, files, Target(out, resume=True))
        source.write_bytes(content)
        assert score_file(scorer, files, Target(out, resume=True)).pairs_before > 0
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()


def test_each_of_several_inputs_must_stay_as_it_is_until_it_is_read(tmp_path: Path, scorer: Scorer) -> None:
    sources = [write_rows(tmp_path / f"{number}.jsonl", ROWS) for number in range(3)]
    files, out = Files(sources, ScoreTask(), OPTIONS), tmp_path / "out.jsonl"
    with pytest.raises(CappyError, match=re.escape(CHANGED.format(sources[2]))):
        score_file(scorer, files, Target(out), progress=once(lambda: cut(sources[2])))
    assert len(Names(out).partial.read_bytes().splitlines()) == 400
    changed = iter([lambda totals: cut(sources[0])])

    def after_the_first(totals: Totals) -> None:
        if totals.pairs > 300:
            next(changed, lambda totals: None)(totals)

    sources[2].write_bytes(sources[1].read_bytes())
    assert score_file(scorer, files, Target(out, force=True), progress=after_the_first).pairs == 600


def test_an_input_that_is_replaced_by_another_file_is_read_to_its_end(tmp_path: Path, scorer: Scorer) -> None:
    source, other = write_rows(tmp_path / "in.jsonl", ROWS), write_rows(tmp_path / "other.jsonl", ROWS[:3])
    files, out = Files([source], ScoreTask(), OPTIONS), tmp_path / "out.jsonl"
    assert score_file(scorer, files, Target(out), progress=once(lambda: other.replace(source))).pairs == 200


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet"])
def test_an_input_that_is_replaced_at_any_opening_is_an_error_or_read_as_it_was(
    form: str, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked by one opening was read by another one."""
    if form in ("jsonl.zst", "parquet"):
        pytest.importorskip("pyarrow")
    source, other = tmp_path / f"in.{form}", write_rows(tmp_path / f"other.{form}", ROWS[20:30])
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    files, opened = Files([source], ScoreTask(), RowOptions(window=8)), Path.open
    score_file(scorer, Files([write_rows(source, ROWS[:20])], ScoreTask(), files.options), Target(whole))
    for times in range(1, 9):
        write_rows(source, ROWS[:20])
        left = [times]

        def open_and_replace(path: Path, *arguments: Any, left: list[int] = left, **options: Any) -> Any:
            file = opened(path, *arguments, **options)
            if path == source:
                left[0] -= 1
                if not left[0]:
                    shutil.copyfile(other, tmp_path / "new").replace(source)
            return file

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_and_replace)
            found = ""
            try:
                score_file(scorer, files, Target(out, force=True))
            except CappyError as error:
                found = str(error)
        assert found in ("", CHANGED.format(source))
        assert found or out.read_bytes() == whole.read_bytes(), f"replaced at opening {times}"
        if left[0] > 0:
            return
    raise AssertionError("the input is opened more than eight times")


def test_what_is_written_to_a_stream_ends_in_an_error_too(tmp_path: Path, scorer: Scorer) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    output: list[bytes] = []
    with pytest.raises(CappyError, match=re.escape(CHANGED.format(source))):
        score_to(scorer, Files([source], ScoreTask(), OPTIONS), output.append, progress=once(lambda: cut(source)))
    assert 0 < len(b"".join(output).splitlines()) < 100
    assert all("score" in json.loads(line) for line in b"".join(output).splitlines())


def test_a_run_does_not_go_on_with_a_file_that_lost_rows(
    tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at the mark it would have zeros for them."""
    source, out = write_rows(tmp_path / "in.jsonl", ROWS[:40]), tmp_path / "out.jsonl"
    stopped(monkeypatch, 3, lambda: run(scorer, source, out))
    partial = Names(out).partial
    partial.write_bytes(partial.read_bytes()[:100])
    with pytest.raises(
        OutputError, match=r"out\.jsonl\.partial has 100 bytes, and \d+ were written; remove it and start"
    ):
        run(scorer, source, out, resume=True)
    assert partial.stat().st_size == 100
    assert not out.exists()


@pytest.mark.slow
def test_a_change_anywhere_in_a_file_too_large_to_be_read_twice_is_seen(tmp_path: Path) -> None:
    large, found = tmp_path / "large.jsonl", set[str]()
    size = 2 * BLOCKS * BLOCK_BYTES
    with large.open("wb") as file:
        file.truncate(size)
        for place, count in ((0, 1), (size // 2, 3 * BLOCK_BYTES), (size - 1, 1)):  # single bytes between may be missed
            file.seek(place)
            file.write(b"x" * count)
            file.flush()
            found.add(fingerprint(large))
    assert len(found) == 3
