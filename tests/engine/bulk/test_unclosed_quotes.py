"""A quote of CSV that is not closed takes lines with it: all of them are told and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.cli.main import main
from cappy_engine.errors import InvalidLine
from tests.support.bulk_files import WINDOW, run, stopped

LIMIT = 1000
ROW = b"Is it?,Yes\n"
BEHIND = 200
"""Rows behind the open quote: more than fit into the limit, which ends at this line."""
LAST = 12 + LIMIT // len(ROW)


def write_source(path: Path, *, behind: int = BEHIND, closing: bytes = b"") -> Path:
    path.write_bytes(b"instruction,response\n" + 10 * ROW + b'Is it?,"Yes\n' + behind * ROW + closing)
    return path


def rejects_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_lines_behind_an_open_quote_are_told_and_counted(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, bad = write_source(tmp_path / "in.csv"), tmp_path / "out.csv", tmp_path / "bad.jsonl"
    options = ["--bundle", str(bundle), "--max-line-bytes", str(LIMIT)]
    assert main(["score", str(source), "-o", str(out), "--rejects", str(bad), *options]) == 3
    lost = LAST - 12 + 1
    assert f"{lost} bad lines skipped" in capsys.readouterr().err
    problem = f"is longer than {LIMIT} bytes (max_line_bytes); is a quote not closed? (lines 12 to {LAST})"
    assert [(each["line"], each["error"]) for each in rejects_in(bad)] == [(12, problem)]
    assert len(out.read_bytes().splitlines()) + lost == len(source.read_bytes().splitlines())
    assert main(["score", str(source), "-o", str(tmp_path / "other.csv"), *options]) == 1
    assert f"line 12: {problem}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("behind", "closing", "problem"),
    [
        (5, b"", "not CSV (unexpected end of data); is a quote not closed? (lines 12 to 17)"),
        (5, b'Is "it"?,Yes\n', "not CSV (',' expected after '\"') (lines 12 to 18)"),
        (1, b'it?",Yes\n', "has 3 values, and the first line names 2 columns (lines 12 to 14)"),
        (1, b"it\xff?\n", "not UTF-8 (byte 2: 0xff) (lines 12 to 14)"),
    ],
)
def test_a_bad_row_of_several_lines_tells_them_all(
    behind: int, closing: bytes, problem: str, tmp_path: Path, scorer: Scorer
) -> None:
    source, bad = write_source(tmp_path / "in.csv", behind=behind, closing=closing), tmp_path / "bad.jsonl"
    totals = run(scorer, source, tmp_path / "out.csv", options=RowOptions("skip", window=WINDOW), rejects=bad)
    assert [each["error"] for each in rejects_in(bad)] == [problem]
    assert (totals.pairs, totals.refused) == (10, len(source.read_bytes().splitlines()) - 11)
    with pytest.raises(InvalidLine) as caught:
        run(scorer, source, tmp_path / "other.csv")
    assert str(caught.value).endswith(problem)


def test_a_row_of_several_lines_whose_pair_is_refused_counts_with_all_of_them(tmp_path: Path, scorer: Scorer) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b'instruction,response\nq,"a\n' + b"word " * 900 + b'\nb"\nq,a\n')
    options = RowOptions("skip", too_long="refuse", window=WINDOW)
    totals = run(scorer, source, tmp_path / "out.csv", options=options)
    assert (totals.pairs, totals.refused) == (1, 3)


@pytest.mark.parametrize("commits", range(1, 17, 3))
def test_a_run_goes_on_behind_an_open_quote(
    commits: int, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, bad = write_source(tmp_path / "in.csv"), tmp_path / "out.csv", tmp_path / "bad.jsonl"
    options = RowOptions("skip", max_line_bytes=LIMIT, window=WINDOW)
    whole = run(scorer, source, tmp_path / "whole.csv", options=options, rejects=tmp_path / "whole.jsonl")
    stopped(monkeypatch, commits, lambda: run(scorer, source, out, options=options, rejects=bad))
    totals = run(scorer, source, out, options=options, rejects=bad, resume=True)
    assert (totals.pairs, totals.refused) == (whole.pairs, whole.refused)
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert bad.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
