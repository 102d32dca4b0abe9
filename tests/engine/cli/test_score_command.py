"""`cappy score`: results on stdout, everything else on stderr, and an exit status to rely on."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.cli.main import main
from tests.support.command_line import LONG, expected_rows, rows_in, write_bad_pairs


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """The rows of `pairs_file`, then a bad line, then one more row."""
    return write_bad_pairs(tmp_path / "bad.jsonl")


def test_score_writes_rows_to_stdout_and_the_rest_to_stderr(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(pairs_file), "--bundle", str(bundle)]) == 0
    out, err = capfdbinary.readouterr()
    assert rows_in(out) == expected_rows(bundle, pairs_file)
    assert f"{bundle}: fp32 on cpu".encode() in err
    assert b"auto: " not in err
    assert b"5 pairs scored in " in err
    assert b", 1 blank line\n" in err


def test_score_writes_a_file_that_appears_when_it_is_complete(
    bundle: Path, pairs_file: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = tmp_path / "scored.jsonl"
    output.write_text("of an earlier run")
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(output), "--force"]) == 0
    assert rows_in(output.read_bytes()) == expected_rows(bundle, pairs_file)
    assert capfdbinary.readouterr().out == b""
    assert list(tmp_path.glob("*.partial*")) == []


def test_score_reads_stdin(
    bundle: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pairs_file.read_bytes())))
    assert main(["score", "-", "--bundle", str(bundle)]) == 0
    assert rows_in(capfdbinary.readouterr().out) == expected_rows(bundle, pairs_file)


def test_score_unpacks_a_gz_file(
    bundle: Path, pairs_file: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(pairs_file.read_bytes()))
    assert main(["score", str(packed), "--bundle", str(bundle)]) == 0
    assert rows_in(capfdbinary.readouterr().out) == expected_rows(bundle, pairs_file)


@pytest.mark.parametrize(
    "cut", [lambda whole: whole[:-9], lambda whole: b"no gzip", lambda whole: whole[:30] + b"~" * 9]
)
def test_score_of_a_damaged_gz_file_is_an_error_that_names_it(
    cut: Callable[[bytes], bytes], bundle: Path, pairs_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(cut(gzip.compress(pairs_file.read_bytes())))
    assert main(["score", str(packed), "--bundle", str(bundle)]) == 1
    err = capfd.readouterr().err
    assert "pairs.jsonl.gz is not a complete gzip file" in err
    assert "Traceback" not in err


def test_score_stops_at_a_bad_line_after_writing_what_came_before(
    bundle: Path, bad_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(bad_file), "--bundle", str(bundle)]) == 1
    out, err = capfdbinary.readouterr()
    assert [row["id"] for row in rows_in(out)] == [0, 1, 2, 3, 4]
    assert b"cappy score: line 7: has no field 'response'; found 'instruction'" in err
    assert b"Traceback" not in err


def test_score_keeps_the_old_file_and_names_the_partial_one_on_an_error(
    bundle: Path, bad_file: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = tmp_path / "scored.jsonl"
    output.write_text("of an earlier run")
    assert main(["score", str(bad_file), "--bundle", str(bundle), "-o", str(output), "--force"]) == 1
    partial = tmp_path / "scored.jsonl.partial"
    assert output.read_text() == "of an earlier run"
    assert [row["id"] for row in rows_in(partial.read_bytes())] == [0, 1, 2, 3, 4]
    out, err = capfdbinary.readouterr()
    assert out == b""
    advice = "go on with --resume --force --rejects NEWFILE, which leaves bad rows out"
    assert f"what was written before this is in {partial}; {advice}".encode() in err
    same = ["score", str(bad_file), "--bundle", str(bundle), "-o", str(output)]
    assert main([*same, "--resume", "--force", "--rejects", str(tmp_path / "rejects.jsonl")]) == 3
    assert [row["id"] for row in rows_in(output.read_bytes())[:5]] == [0, 1, 2, 3, 4]


def test_score_skips_bad_lines_where_asked_and_says_so_in_its_exit_status(
    bundle: Path, bad_file: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = tmp_path / "scored.jsonl"
    arguments = ["score", str(bad_file), "--bundle", str(bundle), "-o", str(output), "--on-error", "skip"]
    assert main(arguments) == 3
    assert [row["response"] for row in rows_in(output.read_bytes())][-1] == "last"
    assert len(rows_in(output.read_bytes())) == 6
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert b"1 bad line skipped" in err


def test_score_uses_the_options_given(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    options = "--device cpu --precision int8 --threads 1 --max-batch-tokens 77 --score-field cappy --verbose".split()
    assert main(["score", str(pairs_file), "--bundle", str(bundle), *options]) == 0
    out, err = capfdbinary.readouterr()
    assert "int8 (asked for) on cpu (asked for), 1 thread, mode latency" in err.decode()
    assert "batches of up to 77 tokens, padding removed" in err.decode()
    assert all("cappy" in row and "score" not in row for row in rows_in(out))


def test_quiet_leaves_stderr_to_warnings_and_errors(
    bundle: Path, pairs_file: Path, bad_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "--quiet"]) == 0
    out, err = capfdbinary.readouterr()
    assert rows_in(out) == expected_rows(bundle, pairs_file)
    assert err == b""
    assert main(["score", str(bad_file), "--bundle", str(bundle), "--quiet"]) == 1
    assert capfdbinary.readouterr().err.startswith(b"cappy score: line 7: ")


def test_score_counts_truncated_pairs(bundle: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": LONG, "response": "Yes"}))
    assert main(["score", str(tmp_path / "long.jsonl"), "--bundle", str(bundle)]) == 0
    out, err = capfdbinary.readouterr()
    assert rows_in(out)[0]["score_truncated"] is True
    assert b"1 truncated" in err


def test_score_of_nothing_writes_nothing(
    bundle: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert main(["score", str(tmp_path / "empty.jsonl"), "--bundle", str(bundle)]) == 0
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert b"0 pairs scored" in err


def test_score_of_a_file_that_is_not_there_is_an_error_that_names_it(
    bundle: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = tmp_path / "scored.jsonl"
    assert main(["score", str(tmp_path / "absent.jsonl"), "--bundle", str(bundle), "-o", str(output)]) == 1
    assert b"absent.jsonl" in capfdbinary.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_input_is_found_before_the_bundle_is_opened(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    absent = tmp_path / "absent.jsonl"
    assert main(["score", str(absent), "--bundle", str(tmp_path / "no-bundle")]) == 1
    assert capfdbinary.readouterr().err == b"cappy score: %s: No such file or directory\n" % os.fsencode(absent)


def test_score_into_a_folder_that_is_not_there_is_an_error_that_names_it(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = pairs_file.parent / "absent" / "scored.jsonl"
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(output)]) == 1
    err = capfdbinary.readouterr().err
    assert b"cappy score: " in err
    assert b"absent" in err
    assert b"what was written before" not in err  # nothing was


def test_score_with_a_folder_that_is_not_a_bundle_is_an_error(
    pairs_file: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(pairs_file), "--bundle", str(tmp_path)]) == 1
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert b"it has no manifest.json; make one with 'cappy export'" in err


def test_an_output_link_is_followed_and_a_pipe_written_to(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, target, fifo = tmp_path / "link", tmp_path / "target", tmp_path / "fifo"
    target.write_text("of an earlier run")
    link.symlink_to(target)
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(link), "--force"]) == 0
    assert link.is_symlink()
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
        assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(fifo)]) == 0
        assert reader.stdout is not None
        assert reader.stdout.read() == target.read_bytes()
    assert fifo.is_fifo()


def test_an_input_with_the_name_of_the_unfinished_output_is_kept(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "scored.jsonl.partial"
    source.write_bytes(pairs_file.read_bytes())
    assert main(["score", str(source), "--bundle", str(bundle), "-o", str(tmp_path / "scored.jsonl")]) == 1
    assert "scored.jsonl.partial has the name of our unfinished output; rename it" in capsys.readouterr().err
    assert source.read_bytes() == pairs_file.read_bytes()


def test_score_into_a_folder_is_refused_before_anything_is_scored(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(tmp_path / "folder")]) == 1
    assert "must be a file, not a folder" in capsys.readouterr().err
    assert not (tmp_path / "folder.partial").exists()


def test_score_counts_empty_instructions(
    bundle: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"instruction": "", "response": "Yes"}\n{"instruction": "Is it?", "response": ""}\n')
    assert main(["score", str(path), "--bundle", str(bundle)]) == 0
    assert b"0 truncated, 1 with an empty instruction\n" in capfdbinary.readouterr().err


def test_score_gives_the_sigmoid_where_asked_to(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "--activation", "sigmoid"]) == 0
    rows = rows_in(capfdbinary.readouterr().out)
    with Scorer.open(bundle, device="cpu") as scorer:
        scores = scorer.score([(row["instruction"], row["response"]) for row in rows], activation="sigmoid")
    assert [row["score"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-6)
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "--activation", "softmax"]) == 2
    assert b"'softmax' is not one of 'identity', 'sigmoid'" in capfdbinary.readouterr().err


@pytest.mark.parametrize("words", [["--too-long", "refuse"], ["--max-text-chars", "100"]])
def test_score_refuses_what_is_too_long_where_asked_to(
    bundle: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], words: list[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"instruction": "Is it?", "response": LONG}))
    assert main(["score", str(path), "--bundle", str(bundle), *words]) == 1
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert (b"has 2410 tokens" if "refuse" in words else b"response has 5600 characters") in err
