"""A file of bad rows belongs to one run: each bad row is there once, however the run is stopped and goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.folders import Folder, score_folder
from cappy_engine.bulk.formats.json_lines import open_lines
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.errors import OutputError
from tests.support.bulk_files import WINDOW, pairs_of, run, stopped, write_rows

SKIP = RowOptions("skip", window=WINDOW)


def write_source(path: Path, *, bad: tuple[int, ...] = (3, 20, 40)) -> Path:
    rows = pairs_of(48)
    for number in bad:
        rows[number]["response"] = None
    return write_rows(path, rows)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "in.jsonl")


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    return tmp_path / "bad.jsonl"


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["line"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("commits", [1, 4])
def test_rejects_may_be_added_to_a_run_that_skipped_rows_without_them(
    commits: int, source: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, commits, lambda: run(scorer, source, out, options=SKIP))
    stopped(monkeypatch, 2, lambda: run(scorer, source, out, options=SKIP, resume=True, rejects=bad))
    assert run(scorer, source, out, options=SKIP, resume=True, rejects=bad).refused == 3
    assert lines_of(bad) == ([4, 21, 41] if commits == 1 else [41])
    assert len(out.read_bytes().splitlines()) == 45
    assert {path.name for path in out.parent.iterdir()} == {"in.jsonl", "out.jsonl", "bad.jsonl"}


@pytest.mark.parametrize("other", [None, "other.jsonl"])
def test_rejects_of_a_run_are_not_dropped_or_changed(
    other: str | None, source: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(OutputError, match=rf"the bad rows of this run are in {bad}; give it as --rejects, or start"):
        run(scorer, source, out, options=SKIP, resume=True, rejects=other and out.parent / other)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    run(scorer, source, out, options=SKIP, resume=True, rejects=bad)
    assert lines_of(bad) == [4, 21, 41]


def test_a_run_of_bad_rows_alone_is_kept_by_such_an_error(
    tmp_path: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "in.jsonl", bad=tuple(range(30)))
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    assert not Names(out).partial.stat().st_size
    with pytest.raises(OutputError, match="the bad rows of this run are in"):
        run(scorer, source, out, options=SKIP, resume=True)
    run(scorer, source, out, options=SKIP, resume=True, rejects=bad)
    assert lines_of(bad) == list(range(1, 31))


@pytest.mark.parametrize("resume", [False, True])
def test_rejects_of_another_run_are_not_taken_over(
    resume: bool, source: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    before = Names(bad).partial.read_bytes()
    second = out.with_name("second.jsonl")
    with pytest.raises(
        OutputError, match=r"bad\.jsonl\.partial holds the bad rows of another run; choose another name"
    ):
        run(scorer, source, second, options=SKIP, resume=resume, rejects=bad)
    assert Names(bad).partial.read_bytes() == before
    assert not list(out.parent.glob("second*"))
    run(scorer, source, out, options=SKIP, resume=True, rejects=bad)
    assert lines_of(bad) == [4, 21, 41]


@pytest.mark.parametrize("resume", [False, True])
def test_rejects_that_are_there_where_the_output_is_gone_are_told_how_to_go_on(
    resume: bool, source: Path, out: Path, bad: Path, scorer: Scorer
) -> None:
    run(scorer, source, out, options=SKIP, rejects=bad)
    before = bad.read_bytes()
    out.unlink()
    problem = (
        r"bad\.jsonl exists, and bad rows go to a new file; move or remove it, choose another name for --rejects, or"
    )
    with pytest.raises(OutputError, match=problem):
        run(scorer, source, out, options=SKIP, rejects=bad, resume=resume)
    assert {path.name: path.read_bytes() for path in (bad,)} == {"bad.jsonl": before}
    assert not list(out.parent.glob("out*"))
    run(scorer, source, out, options=SKIP, rejects=bad, resume=resume, force=True)
    assert bad.read_bytes() == before


def test_a_run_that_was_moved_with_its_rejects_goes_on(
    source: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    folder = out.parent / "moved"
    folder.mkdir()
    for path in out.parent.glob("*.jsonl.*"):
        path.rename(folder / path.name)
    monkeypatch.chdir(folder)
    run(scorer, source, Path(out.name), options=SKIP, resume=True, rejects=Path(bad.name))
    assert lines_of(folder / bad.name) == [4, 21, 41]


def test_rejects_that_were_lost_are_an_error(
    source: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    Names(bad).partial.unlink()
    with pytest.raises(OutputError, match=r"bad\.jsonl\.partial is missing; restore it, or start anew"):
        run(scorer, source, out, options=SKIP, resume=True, rejects=bad)
    run(scorer, source, out, options=SKIP, force=True, rejects=bad)
    assert lines_of(bad) == [4, 21, 41]


def content_of(path: Path) -> list[int]:
    with open_lines(path) as lines:
        return [json.loads(line)["line"] for line in lines]


@pytest.mark.parametrize("name", ["bad.jsonl.gz", "bad.jsonl.zst"])
@pytest.mark.parametrize("commits", [1, 3, 5, 7])
def test_rejects_are_packed_as_their_name_says_also_by_a_run_that_goes_on(
    commits: int, name: str, source: Path, out: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = out.with_name(name)
    stopped(monkeypatch, commits, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    run(scorer, source, out, options=SKIP, resume=True, rejects=bad)
    assert content_of(bad) == [4, 21, 41]
    written = bad.read_bytes()
    run(scorer, source, out, options=SKIP, force=True, rejects=bad)
    assert bad.read_bytes() == written


@pytest.mark.parametrize("name", ["bad.jsonl.gz", "bad.jsonl.zst"])
def test_packed_rejects_without_a_row_are_a_whole_file(name: str, tmp_path: Path, out: Path, scorer: Scorer) -> None:
    source = write_source(tmp_path / "in.jsonl", bad=())
    run(scorer, source, out, options=SKIP, rejects=tmp_path / name)
    assert content_of(tmp_path / name) == []


def test_rejects_of_a_run_are_not_packed_in_part(
    source: Path, out: Path, bad: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad.with_name("link.gz").symlink_to(bad.name)
    stopped(monkeypatch, 3, lambda: run(scorer, source, out, options=SKIP, rejects=bad))
    with pytest.raises(OutputError, match=r"the bad rows of this run are in .*; give it as --rejects, or start anew"):
        run(scorer, source, out, options=SKIP, resume=True, rejects=bad.with_name("link.gz"))


KEPT = ["partial", "settings.json", "settings.json.new", "progress.json", "progress.json.new", "made"]
KEPT += ["partial.settings.json", "partial.settings.json.new"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("scored", "rejected"),
    [*(("out.jsonl", f"out.jsonl.{kept}") for kept in KEPT), ("bad.jsonl.partial", "bad.jsonl")],
)
def test_rejects_do_not_take_a_name_of_the_run_nor_a_run_one_of_theirs(
    scored: str, rejected: str, force: bool, source: Path, scorer: Scorer
) -> None:
    there = source.with_name(rejected)
    there.write_text("mine")
    run(scorer, source, source.with_name("other.jsonl"), options=SKIP)
    before = {path: path.read_bytes() for path in source.parent.iterdir()}
    with pytest.raises(OutputError, match=r"--rejects .*/\S+ and -o .*/\S+ both need .*; choose another name"):
        run(scorer, source, source.with_name(scored), options=SKIP, force=force, rejects=there)
    assert {path: path.read_bytes() for path in source.parent.iterdir()} == before


def test_rejects_are_not_another_link_to_the_output(source: Path, out: Path, bad: Path, scorer: Scorer) -> None:
    out.write_text("mine")
    bad.hardlink_to(out)
    with pytest.raises(OutputError, match=r"--rejects and -o are both .*; choose another name"):
        run(scorer, source, out, options=SKIP, force=True, rejects=bad)
    assert out.read_text() == "mine"


def test_a_run_takes_the_place_of_no_pipe(source: Path, out: Path, bad: Path, scorer: Scorer) -> None:
    os.mkfifo(bad)
    reader = os.open(bad, os.O_RDONLY | os.O_NONBLOCK)
    for place, rejects in ((bad, None), (out, bad)):
        with pytest.raises(OutputError, match=r"bad\.jsonl is not a file, and a run could not go on with it; name a f"):
            run(scorer, source, place, options=SKIP, force=True, rejects=rejects)
    os.close(reader)
    assert bad.is_fifo()
    assert sorted(source.parent.iterdir()) == [bad, source]


def test_rejects_of_one_file_are_not_the_output_of_another(source: Path, tmp_path: Path, scorer: Scorer) -> None:
    second = write_rows(tmp_path / "in.jsonl.rejects.jsonl", pairs_of(3))
    folder = Folder([(path, Path(path.name)) for path in (source, second)], tmp_path / "out", options=SKIP)
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(OutputError, match=r"in\.jsonl\.rejects\.jsonl is an output too; choose another folder"):
        score_folder(scorer, folder, Target(tmp_path / "out", tmp_path / "link", force=True))
    assert score_folder(scorer, folder, Target(tmp_path / "out", tmp_path / "bad")).refused == 3
