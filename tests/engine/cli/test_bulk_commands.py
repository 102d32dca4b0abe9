"""`cappy score` and `cappy rank` on files: folders, globs, rejects, a kill, a full disk, what is not rows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk import formats
from cappy_engine.cli.main import main
from tests.support.bulk_files import pairs_of, write_rows
from tests.support.command_line import CAPPY, in_shell, rows_in


def score(*arguments: str | Path) -> int:
    return main(["score", *map(str, arguments), "--quiet"])


# Several files


def test_a_folder_is_scored_into_a_folder_of_the_same_names(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.csv", "deep/a.jsonl.gz", "deep/.a.jsonl"):
        write_rows(tmp_path / "in" / name, pairs_of(5))
    (tmp_path / "in" / "README.md").write_text("not rows")
    assert score(tmp_path / "in", "-o", tmp_path / "out", "--bundle", bundle) == 0
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == ["a.jsonl", "b.csv", "deep/a.jsonl.gz"]
    assert f"note: hidden files of rows are not read: {tmp_path}/in/deep/.a.jsonl;" in capsys.readouterr().err
    assert len(rows_in((tmp_path / "out" / "a.jsonl").read_bytes())) == 5


def test_a_folder_goes_on_and_leaves_complete_files_alone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_rows(tmp_path / "in" / name, pairs_of(5))
    good = (tmp_path / "in" / "b.jsonl").read_bytes()
    arguments: list[str | Path] = [tmp_path / "in", "-o", tmp_path / "out", "--bundle", bundle]
    (tmp_path / "in" / "b.jsonl").write_bytes(b"oops\n")
    assert score(*arguments) == 1
    assert f"cappy score: {tmp_path}/in/b.jsonl, line 1: not JSON" in capsys.readouterr().err
    assert score(*arguments) == 1
    assert "a.jsonl exists; choose another folder, go on with --resume" in capsys.readouterr().err
    (tmp_path / "in" / "b.jsonl").write_bytes(good)
    before = (tmp_path / "out" / "a.jsonl").stat().st_mtime_ns
    assert score(*arguments, "--resume", "--score-field", "other") == 1
    assert "a.jsonl was written with other settings or from another input" in capsys.readouterr().err
    assert score(*arguments, "--resume") == 0
    assert (tmp_path / "out" / "a.jsonl").stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_files_and_globs_are_scored_into_one_file_in_their_order(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("2.jsonl", "10.jsonl", "other.jsonl")):
        write_rows(tmp_path / name, [{**row, "file": number} for row in pairs_of(4)])
    arguments: list[str | Path] = [tmp_path / "other.jsonl", f"{tmp_path}/[0-9]*.jsonl", "--bundle", bundle]
    assert score(*arguments, "-o", tmp_path / "all.jsonl") == 0
    assert [row["file"] for row in rows_in((tmp_path / "all.jsonl").read_bytes())] == [2] * 4 + [1] * 4 + [0] * 4
    assert score(f"{tmp_path}/none*.jsonl", "--bundle", bundle) == 1
    assert "no file matches" in capsys.readouterr().err
    write_rows(tmp_path / "3.csv", pairs_of(1))
    assert score(tmp_path / "2.jsonl", tmp_path / "3.csv", "--bundle", bundle) == 1
    assert "the inputs have several formats, JSON Lines and CSV" in capsys.readouterr().err
    (tmp_path / "2.jsonl").write_bytes(b"{}\n")
    assert score(*arguments) == 1
    assert f"{tmp_path}/2.jsonl, line 1: has no field 'instruction'" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["*.jsonl", "a*"])
def test_a_glob_is_scored_into_a_folder_that_is_there(pattern: str, bundle: Path, tmp_path: Path) -> None:
    for name in ("in/a.jsonl", "in/b.jsonl", "out/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, pairs_of(2))
    assert score(f"{tmp_path}/in/{pattern}", "-o", tmp_path / "out", "--bundle", bundle) == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == (["a.jsonl", "x"] if pattern == "a*" else ["a.jsonl", "b.jsonl", "x"])


def test_a_link_that_leads_nowhere_is_not_left_out_of_a_folder_or_a_glob(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "a.jsonl", pairs_of(2))
    (tmp_path / "in" / "c.jsonl").symlink_to("/nowhere/c.jsonl")
    for name in ("in", "in/*.jsonl", "in/**"):
        assert score(tmp_path / name, "-o", tmp_path / "out", "--bundle", bundle) == 1
        assert "in/c.jsonl cannot be read: No such file or directory; mend it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["-o", "--rejects"])
@pytest.mark.parametrize("inputs", [["a.jsonl"], ["a.jsonl", "b.jsonl"], ["*.jsonl"]], ids=str)
def test_a_name_with_a_slash_at_its_end_does_not_become_that_of_a_file(
    inputs: list[str], option: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, pairs_of(2))
    outputs = {"-o": f"{tmp_path}/out.jsonl", option: f"{tmp_path}/new/"}
    words = [word for pair in outputs.items() for word in pair]
    assert score(*(tmp_path / name for name in inputs), *words, "--bundle", bundle) == 1
    is_made_first = option == "-o" and inputs != ["a.jsonl"]
    problem = (
        "is not a folder; make it first" if is_made_first else "is a folder's name, and all is written to one file"
    )
    assert f"{tmp_path}/new/ {problem}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "in" / "a.jsonl")
    assert score(tmp_path / "in", "-o", f"{tmp_path}/new/", "--bundle", bundle) == 0
    assert (tmp_path / "new" / "a.jsonl").is_file()


def test_inputs_of_one_name_are_not_written_into_one_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "a.jsonl", pairs_of(2))
    assert score(tmp_path / "x", tmp_path / "y", "-o", tmp_path / "out", "--bundle", bundle) == 1
    assert "two inputs are called a.jsonl; give them in two commands" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-o", "--rejects"])
def test_a_folder_is_not_written_into_itself(
    option: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    source = write_rows(tmp_path / "in" / "a.jsonl", pairs_of(2))
    outputs = {"-o": tmp_path / "out", "--rejects": tmp_path / "bad", option: tmp_path / "in" / "more"}
    assert score(tmp_path / "in", "--bundle", bundle, *(word for pair in outputs.items() for word in pair)) == 1
    assert "in/more is in the input folder" in capsys.readouterr().err
    assert [*tmp_path.rglob("*.jsonl")] == [source]


@pytest.mark.parametrize("others", [["a.jsonl"], ["folder"], ["pipe"], ["-"], ["a.jsonl", "-"]], ids=str)
def test_a_pipe_among_several_inputs_is_refused(
    others: list[str], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl", "folder/b.jsonl"):
        write_rows(tmp_path / name, pairs_of(2))
    names = [name if name == "-" else tmp_path / name for name in others]
    assert score(*names, tmp_path / "pipe", "-o", tmp_path / "out.jsonl", "--bundle", bundle) == 2
    assert "is a stream, and is read alone; give one input" in capsys.readouterr().err


# Rejects, ranking


def test_rejects_are_in_the_summary_and_the_exit_status(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs_of(5))
    source.write_bytes(source.read_bytes() + b"oops\n")
    arguments = [str(source), "--bundle", str(bundle), "--rejects", str(tmp_path / "bad.jsonl")]
    assert main(["score", *arguments, "-o", str(tmp_path / "out.jsonl")]) == 3
    assert "1 bad line skipped" in capsys.readouterr().err
    assert rows_in((tmp_path / "bad.jsonl").read_bytes()) == [
        {"line": 6, "error": "not JSON (Expecting value: line 1 column 1 (char 0))", "text": "oops"}
    ]
    assert main(["score", *arguments, "--force"]) == 3  # to stdout
    assert len(rows_in(capsys.readouterr().out)) == 5
    assert len(rows_in((tmp_path / "bad.jsonl").read_bytes())) == 1


def test_rank_of_files_writes_winners(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Is it?", "answers": ["Yes", "No"]}] * 3
    source = write_rows(tmp_path / "in.jsonl", rows)
    names = ["--instruction-column", "prompt", "--candidates-column", "answers", "--prefix", "cappy_"]
    assert main(["rank", str(source), "--bundle", str(bundle), *names]) == 0
    captured = capsys.readouterr()
    row = rows_in(captured.out)[0]
    assert list(row) == ["prompt", "answers", "cappy_winner", "cappy_winner_index", "cappy_scores", "cappy_margin"]
    assert row["answers"][row["cappy_winner_index"]] == row["cappy_winner"]
    assert "6 pairs scored in" in captured.err
    assert main(["rank", str(tmp_path / "in.jsonl"), "--bundle", str(bundle)]) == 1
    assert "line 1: has no field 'instruction'" in capsys.readouterr().err


def test_rank_of_files_gives_sigmoids_where_asked_to(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"instruction": "Is it?", "candidates": ["Yes", "No"]}])
    assert main(["rank", str(source), "--bundle", str(bundle), "--activation", "sigmoid"]) == 0
    (row,) = rows_in(capsys.readouterr().out)
    with Scorer.open(bundle, device="cpu") as scorer:
        ranked = scorer.rank("Is it?", ["Yes", "No"], activation="sigmoid")
    assert row["winner"] == ranked[0].response
    assert max(row["scores"]) == pytest.approx(ranked[0].score, abs=1e-6)


# Kill -9, a full disk


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs_of(1500))
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, "-m", "cappy_engine", "score", str(source), "--bundle", str(bundle), "--window", "50"]
    assert score(source, "--bundle", bundle, "--window", "50", "-o", whole) == 0
    with subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "out.jsonl.partial").is_file():
            time.sleep(0.01)
        while process.poll() is None and (tmp_path / "out.jsonl.partial").stat().st_size < 20_000:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*command, "-o", str(out), "--resume"], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b" before, 0 truncated" in done.stderr
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a tmpfs of its own")
def test_a_full_disk_is_an_error_and_the_run_goes_on_once_there_is_room(bundle: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs_of(1500))
    assert score(source, "--bundle", bundle, "--window", "50", "-o", tmp_path / "whole.jsonl") == 0
    folder = tmp_path / "small"
    folder.mkdir()
    command = f"{CAPPY} score {source} --bundle {bundle} --window 50 -o {folder}/out.jsonl"
    done = in_shell(
        f"unshare -rm bash -c 'mount -t tmpfs -o size=96k tmpfs {folder} && {command}; echo status $?; "
        f"mount -o remount,size=10m {folder}; {command} --resume && cp {folder}/out.jsonl {tmp_path}/copy.jsonl'",
        tmp_path,
    )
    error = done.stderr.decode()
    if "unshare" in error or "mount:" in error:
        pytest.skip("needs the right to mount")
    assert b"status 1" in done.stdout
    problem = r"small/out\.jsonl\.\S+ cannot be written: No space left on device; go on with --resume"
    assert re.search(problem, error)
    assert "Traceback" not in error
    assert (tmp_path / "copy.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# What is not rows


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"instruction": "q"}'.encode("utf-16"), "the input is UTF-16 or UTF-32; make it UTF-8"),
        ("a.jsonl", b'{"instruction": "q", "response": "\xe9"}', "line 1: not UTF-8 (byte 34: 0xe9)"),
        ("a.jsonl", b'{"instruction": "q", "response": ["a"]}', "line 1: response must be a str, got list ['a']"),
        ("a.jsonl", b"[1]", "line 1: expected a JSON object"),
        ("a.jsonl", b"x" * 20_000_000, "line 1: is longer than 16777216 bytes (max_line_bytes)"),
        ("a.jsonl", b"PAR1\x15\x04", "line 1: not JSON"),
        ("a.csv", b"", "a.csv has no first line with the names of its columns"),
        ("a.csv", b'{"instruction": "q", "response": "a"}\n', "a.csv has no column 'instruction'; found"),
        ("a.parquet.gz", b"", "a.parquet.gz: a Parquet file is packed inside; give it without .gz"),
    ],
)
def test_what_is_not_rows_is_an_error_without_a_traceback(
    name: str, content: bytes, problem: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert score(tmp_path / name, "--bundle", bundle, "-o", tmp_path / "out.jsonl") == 1
    error = capsys.readouterr().err
    assert problem in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("begin", [b"\xef\xbb\xbf", b""])
@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_a_bom_and_line_ends_of_windows_are_taken(begin: bytes, end: bytes, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(begin + b'{"instruction": "q", "response": "a"}' + end)
    assert score(tmp_path / "a.jsonl", "--bundle", bundle, "-o", tmp_path / "out.jsonl") == 0
    assert json.loads((tmp_path / "out.jsonl").read_bytes())["response"] == "a"


def test_parquet_without_pyarrow_says_how_to_install_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "cappy_engine.bulk.formats.tables", raising=False)
    monkeypatch.delattr(formats, "tables", raising=False)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert score(tmp_path / "a.parquet", "--bundle", bundle, "-o", tmp_path / "out.jsonl") == 1
    assert "a.parquet needs the package 'pyarrow'; in a clone of cappy-engine, run: " in capsys.readouterr().err
