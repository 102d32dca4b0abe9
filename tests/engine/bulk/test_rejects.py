"""A file of bad rows belongs to one run: each bad row is there once, however the run is stopped and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.growing import Names
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.errors import OutputError
from cappy_engine.testing import fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import WINDOW, pairs_of, run, stopped, write_rows

SKIP = RowOptions("skip", window=WINDOW)


@pytest.fixture
def scorer(tokenizer: PairTokenizer) -> Scorer:
    return fake_scorer(tokenizer=tokenizer)


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
