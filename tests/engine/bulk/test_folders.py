"""A folder of files: what is listed as complete is there, as it was written, and nothing else is lost."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cappy_engine import Scorer, storage
from cappy_engine.bulk import score_file
from cappy_engine.bulk.folders import Folder, files_of_folder, score_folder
from cappy_engine.bulk.resume.run_list import RUN
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.errors import CappyError, OutputError
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import WINDOW, Stop, killed, pairs_of, slow_scorer, write_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, pairs_of(2 * WINDOW))
    return folder


def run_folder(
    scorer: Scorer, source: Path, out: Path, *, said: list[str] | None = None, window: int = WINDOW, **target: Any
) -> Totals:
    folder = Folder(files_of_folder(source), out, ScoreTask(), RowOptions(window=window))
    return score_folder(scorer, folder, Target(out, **target), say=print if said is None else said.append)


def folder_of(folder: Path, files: int) -> Path:
    """Make a folder of files with a row each."""
    folder.mkdir()
    for number in range(files):
        write_rows(folder / f"{number:04}.jsonl", pairs_of(number + 1)[-1:])
    return folder


def listed(out: Path) -> list[dict[str, Any]]:
    """Read the list of complete files."""
    return [json.loads(line) for line in (out / RUN).read_bytes().splitlines()]


@pytest.fixture
def stopped_out(scorer: Scorer, source: Path) -> Path:
    """Give a folder in which a.jsonl is complete, and b.jsonl was not begun: its input was damaged, and was mended."""
    good, out = (source / "b.jsonl").read_bytes(), source.parent / "out"
    (source / "b.jsonl").write_bytes(b"oops\n")
    with pytest.raises(CappyError, match="not JSON"):
        run_folder(scorer, source, out)
    (source / "b.jsonl").write_bytes(good)
    return out


def test_a_file_that_was_complete_and_is_gone_is_written_again(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    written = (stopped_out / "a.jsonl").read_bytes()
    (stopped_out / "a.jsonl").unlink()
    said: list[str] = []
    totals = run_folder(scorer, source, stopped_out, said=said, resume=True)
    assert said == [f"{stopped_out}/a.jsonl was complete, and is gone; it is written again"]
    assert (totals.pairs, totals.pairs_before) == (4 * WINDOW, 0)
    assert (stopped_out / "a.jsonl").read_bytes() == written
    assert sorted(path.name for path in stopped_out.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    "change", [lambda written: written[:-9], lambda written: written + b"\n"], ids=["cut", "longer"]
)
def test_a_file_that_was_complete_and_is_not_as_it_was_is_an_error(
    change: Callable[[bytes], bytes], scorer: Scorer, source: Path, stopped_out: Path
) -> None:
    changed = change((stopped_out / "a.jsonl").read_bytes())
    (stopped_out / "a.jsonl").write_bytes(changed)
    with pytest.raises(OutputError, match=r"a\.jsonl has \d+ bytes, and \d+ were written; remove it, and go on"):
        run_folder(scorer, source, stopped_out, resume=True)
    assert (stopped_out / "a.jsonl").read_bytes() == changed


@pytest.mark.parametrize("name", ["z.csv", "z.csv.gz", "z.parquet"])
def test_a_table_that_cannot_be_scored_is_an_error_before_any_file_is(
    scorer: Scorer, source: Path, tmp_path: Path, name: str
) -> None:
    if name == "z.parquet":
        (source / name).write_bytes(b"no table")
    else:
        write = gzip.compress if name.endswith(".gz") else bytes
        (source / name).write_bytes(write(b"instruction,other\nIs it?,Yes\n"))
    with pytest.raises(CappyError, match=re.escape(name)):
        run_folder(scorer, source, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_force_takes_nothing_from_a_run_with_other_settings(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    totals = run_folder(scorer, source, stopped_out, force=True, window=9)
    assert (totals.pairs, totals.pairs_before) == (4 * WINDOW, 0)
    assert sorted(path.name for path in stopped_out.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_bad_row_of_a_folder_is_told_once_whoever_looks_on(scorer: Scorer, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", 3)
    (source / "0000.jsonl").write_bytes(b"oops\n" + (source / "0000.jsonl").read_bytes())
    folder = Folder(files_of_folder(source), tmp_path / "out", options=RowOptions("skip", window=1))
    totals = score_folder(scorer, folder, Target(tmp_path / "out"), progress=lambda totals: None)
    assert (totals.pairs, totals.refused, len(totals.skipped)) == (3, 1, 1)


def test_settings_of_a_complete_file_are_those_of_any_run(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    with pytest.raises(OutputError, match=r"from another input \(window was 8, is 9\); start anew"):
        run_folder(scorer, source, stopped_out, resume=True, window=9)
    with (source / "a.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(OutputError, match=r"from another input \(input\.a\.jsonl was .*\); start anew"):
        run_folder(scorer, source, stopped_out, resume=True)


@pytest.mark.parametrize("content", [b"mine", b'{"mine": 1}', b'{"done": {"a": {}}}', b'{"done": [1]}'], ids=repr)
@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_a_file_of_the_user_with_the_name_of_the_list_is_not_lost(
    options: dict[str, Any], content: bytes, scorer: Scorer, source: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "out" / RUN
    mine.parent.mkdir()
    mine.write_bytes(content)
    with pytest.raises(OutputError, match=r"cappy\.run\.json cannot be read \(.*\); move or remove it, and start anew"):
        run_folder(scorer, source, tmp_path / "out", **options)
    assert mine.read_bytes() == content


def test_the_list_is_there_until_all_are_complete(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    assert [entry["file"] for entry in listed(stopped_out)] == ["a.jsonl"]
    totals = run_folder(scorer, source, stopped_out, resume=True)
    assert (totals.pairs_before, 2 * totals.tokens_before) == (2 * WINDOW, totals.tokens)
    assert not (stopped_out / RUN).exists()


def test_a_folder_that_is_complete_already_is_told_so(scorer: Scorer, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_folder(scorer, source, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match=rf"{out} is complete already: all files, 2, are there, .*; choose another f"):
        run_folder(scorer, source, out, resume=True)
    write_rows(source / "c.jsonl", pairs_of(2))
    advice = "or not of this run; move or remove it, choose another folder, or replace it with --force"
    with pytest.raises(OutputError, match=rf"{out}/a\.jsonl exists, .*: it is complete already, {advice}$"):
        run_folder(scorer, source, out, resume=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert run_folder(scorer, source, out, resume=True, force=True).pairs == 4 * WINDOW + 2


def test_the_list_grows_by_a_line_a_file_and_is_not_written_again(scorer: Scorer, tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in", 12), tmp_path / "out"
    seen: list[tuple[int, bytes]] = []

    def look(totals: Totals) -> None:
        if (out / RUN).exists():
            seen.append(((out / RUN).stat().st_ino, (out / RUN).read_bytes()))

    score_folder(scorer, Folder(files_of_folder(source), out), Target(out), progress=look)
    assert [content.count(b"\n") for _, content in seen] == list(range(1, 12))
    assert len({number for number, _ in seen}) == 1
    assert all(late.startswith(early) for (_, early), (_, late) in pairwise(seen))


def test_a_list_that_another_run_took_away_has_all_files_again(scorer: Scorer, tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in", 4), tmp_path / "out"
    (source / "0003.jsonl").write_bytes(b"oops\n")

    def take_away(totals: Totals) -> None:
        if totals.pairs == 2:
            (out / RUN).unlink()

    with pytest.raises(CappyError, match="not JSON"):
        score_folder(scorer, Folder(files_of_folder(source), out), Target(out), progress=take_away)
    assert [entry["file"] for entry in listed(out)] == ["0000.jsonl", "0001.jsonl", "0002.jsonl"]


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_kill_while_a_file_is_listed_loses_nothing(
    kept: int, scorer: Scorer, source: Path, stopped_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is torn, or there as a whole; what the run knew of the file is still beside it."""

    def add_a_part(file: BinaryIO, content: bytes) -> None:
        if content.startswith(b'{"file": "c.jsonl"'):
            appended(file, content[:kept])
            raise Stop
        appended(file, content)

    appended = storage.append
    write_rows(source / "c.jsonl", pairs_of(WINDOW))
    write_rows(source / "d.jsonl", pairs_of(WINDOW))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "append", add_a_part)
        with pytest.raises(Stop):
            run_folder(scorer, source, stopped_out, resume=True)
    written = (stopped_out / "c.jsonl").stat().st_mtime_ns
    totals = run_folder(scorer, source, stopped_out, resume=True)
    assert (totals.pairs, totals.pairs_before) == (6 * WINDOW, 5 * WINDOW)
    assert (stopped_out / "c.jsonl").stat().st_mtime_ns == written
    assert sorted(path.name for path in stopped_out.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]


def test_a_kill_behind_the_list_leaves_nothing_beside_the_file(
    scorer: Scorer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(names: object) -> None:
        raise Stop

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(score_file, "forget", stop)
        with pytest.raises(Stop):
            run_folder(scorer, source, out)
    assert (out / "a.jsonl.progress.json").exists()
    assert run_folder(scorer, source, out, resume=True).pairs_before == 2 * WINDOW
    assert sorted(path.name for path in out.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_folder_killed_at_random_moments_ends_with_the_same_files(
    seed: int, tmp_path: Path, tokenizer: PairTokenizer
) -> None:
    source, out, whole = folder_of(tmp_path / "in", 40), tmp_path / "out", tmp_path / "whole"
    run_folder(slow_scorer(tokenizer), source, whole)
    chance = random.Random(seed)

    def go_on() -> None:
        run_folder(slow_scorer(tokenizer, 0.03), source, out, said=[], resume=True)

    kills = 0
    while killed(go_on, chance.uniform(0.05, 0.4)) and kills < 30:
        kills += 1
        if len(list(out.glob("*.jsonl"))) == 40 and not (out / RUN).exists():
            break  # killed behind its last step
    assert kills >= 2  # 40 files take 1.2 s
    if (out / RUN).exists():
        go_on()
    left = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".cappy")}
    assert left == {path.name: path.read_bytes() for path in whole.iterdir()}
