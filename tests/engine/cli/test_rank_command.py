"""`cappy rank`: a table or JSON, best first, of texts that stand on the command line, in files or on stdin."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.cli.main import main
from tests.support.command_line import LONG, cappy


def test_rank_prints_a_table_best_first(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = ["A pear", "granite\nrock", "Où?"]
    arguments = [part for candidate in candidates for part in ("--candidate", candidate)]
    assert main(["rank", "--bundle", str(bundle), "--instruction", "Name a fruit.", *arguments]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    with Scorer.open(bundle, device="cpu") as scorer:
        ranked = scorer.rank("Name a fruit.", candidates)
    assert header.split() == ["rank", "score", "index", "response"]
    assert [line.split(maxsplit=3)[:3] for line in lines] == [
        [str(place), f"{candidate.score:.3f}", str(candidate.index)] for place, candidate in enumerate(ranked, start=1)
    ]
    assert [line.split(maxsplit=3)[3] for line in lines] == [
        candidate.response.replace("\n", "·") for candidate in ranked
    ]


def test_rank_prints_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instruction", "Name a fruit.", "--candidate", "Où?", "--candidate", LONG, "--json"]
    assert main(["rank", "--bundle", str(bundle), *arguments]) == 0
    captured = capsys.readouterr()
    with Scorer.open(bundle, device="cpu") as scorer:
        ranked = scorer.rank("Name a fruit.", ["Où?", LONG])
    assert json.loads(captured.out) == [
        {
            "index": candidate.index,
            "response": candidate.response,
            "score": pytest.approx(candidate.score, abs=1e-5),
            "is_truncated": candidate.response == LONG,
            "is_exact": False,
        }
        for candidate in ranked
    ]
    assert "Où?" in captured.out
    assert "1 of 2 pairs were truncated" in captured.err


def test_rank_gives_the_sigmoid_where_asked_to(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instruction", "Name a fruit.", "--candidate", "Où?", "--candidate", "A pear", "--json"]
    assert main(["rank", "--bundle", str(bundle), *arguments, "--activation", "sigmoid"]) == 0
    with Scorer.open(bundle, device="cpu") as scorer:
        ranked = scorer.rank("Name a fruit.", ["Où?", "A pear"], activation="sigmoid")
    found = [(row["response"], row["score"]) for row in json.loads(capsys.readouterr().out)]
    assert found == [(candidate.response, pytest.approx(candidate.score, abs=1e-6)) for candidate in ranked]


def test_rank_on_a_terminal_that_is_not_utf8_ends_without_a_traceback(bundle: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = cappy("rank", "--bundle", bundle, "--instruction", "q", "--candidate", "Où?", env=environment)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
    assert b"O\\xf9?" in done.stdout


ASCII_LOCALE = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--instruction", "Où?", "--candidate", "a"], "--instruction"),
        (["--instruction", "q", "--candidate", "a", "--candidate", "Où?", "--literal"], "--candidate"),
    ],
)
def test_texts_that_the_locale_cannot_read_are_an_error_that_names_it(
    words: list[str], told: str, bundle: Path
) -> None:
    done = cappy("rank", "--bundle", bundle, *words, env=ASCII_LOCALE)
    assert done.returncode == 1
    assert done.stderr.decode() == (
        f"cappy rank: {told} has the byte 0xc3, which ascii, the encoding of the locale, cannot read; set "
        "LC_ALL=C.UTF-8 or PYTHONUTF8=1\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"LC_ALL": "C.UTF-8"}, {"PYTHONUTF8": "1"}], ids=str)
def test_what_the_error_says_to_set_lets_the_texts_be_read(changes: dict[str, str], bundle: Path) -> None:
    words = ["--instruction", "q", "--candidate", "Où?", "--json"]
    done = cappy("rank", "--bundle", bundle, *words, env={**ASCII_LOCALE, **changes})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["response"] == "Où?"


@pytest.mark.slow
def test_a_file_whose_name_the_locale_cannot_read_is_read(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "é.txt").write_text("Où?\nTiens\n", encoding="utf-8")
    words = ["--instruction", "q", "--candidate", f"@{tmp_path / 'é.txt'}", "--json"]
    done = cappy("rank", "--bundle", bundle, *words, env=ASCII_LOCALE)
    assert done.returncode == 0, done.stderr
    assert {row["response"] for row in json.loads(done.stdout)} == {"Où?", "Tiens"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Caf\udce9", "--candidate has the byte 0xe9, which is not UTF-8; give the text in UTF-8"),
        ("Caf\ud800", "response has a lone surrogate '\\ud800' at character 3"),
        ("Caf\udc41", "response has a lone surrogate '\\udc41' at character 3"),
    ],
)
def test_texts_that_are_not_utf8_are_an_error(
    text: str, problem: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", "--bundle", str(bundle), "--instruction", "q", "--candidate", text]) == 1
    assert problem in capsys.readouterr().err


RANK = ["rank", "--json", "--instruction", "Name a fruit."]


def responses(arguments: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Rank by the command line; the responses in the order in which they were given."""
    assert main([*arguments, "--bundle", str(bundle)]) == 0
    return [row["response"] for row in sorted(json.loads(capsys.readouterr().out), key=lambda row: row["index"])]


def test_candidates_come_from_a_file_one_a_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fruits.txt"
    path.write_bytes("a pear\r\n\nOù?\u2028?\n -\n".encode())
    arguments = [*RANK, "--candidate", "first", "--candidate", f"@{path}", "--candidate", "last"]
    assert responses(arguments, bundle, capsys) == ["first", "a pear", "Où?\u2028?", " -", "last"]


def test_candidates_come_from_stdin(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a pear\ngranite")))
    assert responses([*RANK, "--candidate", "-"], bundle, capsys) == ["a pear", "granite"]


def test_an_instruction_comes_from_a_file_without_its_last_line_break(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "instruction.txt"
    path.write_text("Name a fruit,\nor a stone.\n")
    found = []
    for instruction in (f"@{path}", "Name a fruit,\nor a stone.", "Name a fruit,\nor a stone.\n"):
        arguments = ["rank", "--bundle", str(bundle), "--json", "--instruction", instruction, "--candidate", "a pear"]
        assert main(arguments) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["score"])
    assert found[0] == found[1] != found[2]


def test_literal_texts_are_taken_as_they_are(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"not read")))
    arguments = ["rank", "--json", "--literal", "--instruction", "@home", "--candidate", "-", "--candidate", "@you"]
    assert responses(arguments, bundle, capsys) == ["-", "@you"]


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["--candidate", "@nowhere.txt"], 1, "nowhere.txt cannot be read (No such file or directory); with --literal"),
        (["--candidate", "-", "--instruction", "-"], 2, "- was given twice, but stdin is read once"),
        (["--candidate", "@empty.txt"], 1, "@empty.txt held no candidates"),
        (["--candidate", "@latin1.txt"], 1, "--candidate @latin1.txt is not UTF-8"),
        (
            ["--candidate", LONG, "--too-long", "refuse"],
            1,
            "cappy rank: pair 0: has 1810 tokens, and the model takes 512",
        ),
        (["--candidate", "Yes", "--too-long", "cut"], 2, "'cut' is not one of 'truncate', 'refuse'"),
        (
            ["--candidate", "12345", "--max-text-chars", "4"],
            1,
            "cappy rank: pair 0: instruction has 13 characters",
        ),
        (["--candidate", "Yes", "--max-text-chars", "0"], 2, "0 is not in the range x>=1"),
        (["--candidate", "Yes", "--bundle", ""], 2, "'--bundle': an empty path; is a variable not set?"),
        (["--candidate", "@/dev/zero"], 1, "@/dev/zero holds a text of more than max_text_chars, 1000000 characters"),
        (
            ["--candidate", "Yes", "--instruction", "@/dev/zero"],
            1,
            "--instruction @/dev/zero holds a text",
        ),
        (["--candidate", "Yes", "No"], 2, "unexpected argument 'No'; repeat the option for each value: --candidate"),
    ],
)
def test_texts_that_cannot_be_had_are_an_error_with_a_hint(
    arguments: list[str],
    status: int,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin1.txt").write_bytes("Où?".encode("latin-1"))
    assert main([*RANK, *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err


@pytest.mark.slow
def test_the_same_text_from_stdin_by_a_process(bundle: Path) -> None:
    done = cappy("rank", "--bundle", bundle, "--instruction", "q", "--candidate", "-", input="Où?\n".encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[1].endswith("Où?")


def test_rank_says_that_the_instruction_is_empty(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    for instruction in ("", f"@{tmp_path / 'empty.txt'}"):
        assert main(["rank", "--bundle", str(bundle), "--instruction", instruction, "--candidate", "Yes"]) == 0
    assert [record.getMessage() for record in caplog.records] == ["the instruction is empty"] * 2


def test_files_of_other_systems_hold_the_same_texts(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "instruction.txt").write_bytes("\ufeffName a fruit.\r\n".encode())
    (tmp_path / "fruits.txt").write_bytes("\ufeffa pear\r\ngranite\r\n".encode())
    found = []
    for instruction, *candidates in (
        (f"@{tmp_path / 'instruction.txt'}", f"@{tmp_path / 'fruits.txt'}"),
        ("Name a fruit.", "a pear", "granite"),
    ):
        words = [word for candidate in candidates for word in ("--candidate", candidate)]
        assert main(["rank", "--bundle", str(bundle), "--json", "--instruction", instruction, *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


@pytest.mark.parametrize("most", [10**11, sys.maxsize, 10**30])
def test_a_limit_beyond_all_memory_takes_no_memory(
    most: int, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("a pear\ngranite\n")
    asked = ["--instruction", f"@{tmp_path / 'texts.txt'}", "--candidate", f"@{tmp_path / 'texts.txt'}"]
    assert responses(["rank", "--json", *asked, "--max-text-chars", str(most)], bundle, capsys) == ["a pear", "granite"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--candidate", "-", "--instruction"], ["--instruction", "-", "--candidate"]])
def test_a_stdin_that_does_not_wait_is_read_to_its_end(arguments: list[str], bundle: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, "-m", "cappy_engine", "rank", "--bundle", str(bundle), "--json", *arguments, "text"]
    with subprocess.Popen(command, stdin=reader, stdout=subprocess.PIPE) as process:
        os.close(reader)
        for line in (b"one\n", b"two\n"):
            os.write(writer, line)
            time.sleep(2)
        os.close(writer)
        out, _ = process.communicate(timeout=60)
    found = [(row["response"], row["score"]) for row in json.loads(out)]
    with Scorer.open(bundle, device="cpu") as scorer:
        ranked = scorer.rank(*(("text", ["one", "two"]) if arguments[0] == "--candidate" else ("one\ntwo", ["text"])))
    assert found == [(candidate.response, pytest.approx(candidate.score, abs=1e-5)) for candidate in ranked]
