"""Something else removes, replaces or cuts what a run writes: it is an error, and no advice that cannot be followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.input_files import Files
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.resume.partial_file import open_growing
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.score_file import score_file
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.cli.main import main
from cappy_engine.errors import OutputError
from tests.support.bulk_files import WINDOW, pairs_of, write_rows

SKIP = RowOptions("skip", window=WINDOW)
COUNT = 80
MOVED = r"{} was moved or removed while it was written; put it back and go on with --resume, or start anew with --force"


def removed(path: Path) -> None:
    path.unlink()


def moved(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replaced(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").replace(path)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more\n")


DAMAGES = [removed, moved, replaced, emptied, longer]


def run_with_damage(
    scorer: Scorer, out: Path, bad: Path, damaged: Path, damage: Callable[[Path], None], said: list[str]
) -> None:
    """Score into `out` while something happens to a file that it writes."""
    rows = pairs_of(COUNT)
    for number in (3, 20, 70):
        rows[number]["response"] = None
    source, done = write_rows(out.with_name("in.jsonl"), rows), list[Path]()

    def progress(totals: Totals) -> None:
        if totals.pairs > COUNT // 2 and not done and damaged.stat().st_size:
            damage(damaged)
            done.append(damaged)

    score_file(scorer, Files([source], ScoreTask(), SKIP), Target(out, bad), say=said.append, progress=progress)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("which", ["out", "bad"])
def test_what_a_run_writes_is_not_given_its_name_once_something_else_changed_it(
    which: str, damage: Callable[[Path], None], form: str, tmp_path: Path, scorer: Scorer
) -> None:
    out, bad = tmp_path / f"out.{form}", tmp_path / "bad.jsonl"
    damaged = Names(out if which == "out" else bad).partial
    problem = MOVED.format(damaged) if damage in (removed, moved, replaced) else r"\d+ bytes, and \d+ were written"
    said: list[str] = []
    with pytest.raises(OutputError, match=problem):
        run_with_damage(scorer, out, bad, damaged, damage, said)
    assert said == []
    assert not out.exists()
    assert not bad.exists()


@pytest.mark.parametrize("damage", [emptied, longer])
def test_damage_between_a_check_and_what_is_written_then_is_noticed(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    with open_growing(Names(tmp_path / "out.jsonl"), resume=False) as growing:
        growing.append(b"{}\n")
        growing.check_written(3)
        damage(growing.names.partial)
        growing.append(b'{"row": 1}\n')
        with pytest.raises(OutputError, match=r"has \d+ bytes, and 14 were written"):
            growing.check_written(14)


def test_a_run_that_cannot_go_on_is_not_advised_to(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, bad = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    write_rows(source, [*pairs_of(COUNT), {"instruction": "q"}])
    arguments = ["score", str(source), "-o", str(out), "--bundle", str(bundle), "--window", str(WINDOW), "--quiet"]
    assert main(arguments) == 1
    advice = "go on with --resume --rejects NEWFILE, which leaves bad rows out"
    assert f"what was written before this is in {out}.partial; {advice}\n" in capsys.readouterr().err
    os.truncate(Names(out).partial, 100)
    assert main([*arguments, "--resume", "--rejects", str(bad)]) == 1
    told = capsys.readouterr().err
    assert f"{out}.partial has 100 bytes, and " in told
    assert "go on with --resume" not in told
    assert not Names(bad).partial.exists()


def test_a_damaged_input_is_no_reason_to_go_on(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl.gz", pairs_of(5000)), tmp_path / "out.jsonl"
    source.write_bytes(source.read_bytes()[:-100])
    arguments = ["score", str(source), "-o", str(out), "--bundle", str(bundle), "--window", str(WINDOW), "--quiet"]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "is not a complete gzip file" in told
    assert f"what was written before this is in {out}.partial\n" in told
    assert "--resume" not in told


@pytest.mark.slow
def test_rejects_of_a_stream_get_no_name_if_its_output_is_lost(tmp_path: Path, bundle: Path) -> None:
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in pairs_of(20)) + b"oops\n"
    command = [sys.executable, "-m", "cappy_engine", "score", "-", "-o", "out.jsonl", "--rejects", "bad.jsonl"]
    with subprocess.Popen(
        [*command, "--bundle", str(bundle)], cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(rows)
        process.stdin.flush()
        partial, until = tmp_path / "out.jsonl.partial", time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        partial.unlink()
        _, told = process.communicate(rows, timeout=60)
    assert process.returncode == 1
    assert b"out.jsonl.partial was moved or removed meanwhile; run the command again" in told
    assert not (tmp_path / "bad.jsonl").exists()
