"""The command line as people use it: results on stdout, everything else on stderr, and an exit status to rely on."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer, __version__
from cappy_engine.bundle import MANIFEST
from cappy_engine.cli.main import main

COMMANDS = ("export", "verify", "inspect", "score", "rank")
LONG = "The sky is blue, and so on. " * 200


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Five good rows with a blank line among them."""
    rows = [{"id": number, "instruction": "Où? ", "response": "word " * number} for number in range(5)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join([*lines[:2], "\n", *lines[2:]]))
    return path


@pytest.fixture
def bad_file(pairs_file: Path) -> Path:
    """The rows of `pairs_file`, then a bad line, then one more row."""
    path = pairs_file.with_name("bad.jsonl")
    path.write_bytes(pairs_file.read_bytes() + b'{"instruction": "q"}\n{"instruction": "q", "response": "last"}\n')
    return path


def expected_rows(bundle: Path, pairs: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in pairs.read_text().splitlines() if line]
    with Scorer.open(bundle, device="cpu") as scorer:
        scores = scorer.score([(row["instruction"], row["response"]) for row in rows])
    return [{**row, "score": pytest.approx(float(score), abs=1e-5)} for row, score in zip(rows, scores, strict=True)]


def rows_in(output: bytes | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def cappy(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run `cappy` as a process of its own."""
    command = [sys.executable, "-m", "cappy_engine", *map(str, arguments)]
    return subprocess.run(command, timeout=120, check=False, **{"capture_output": True, **options})


# score


def test_score_writes_rows_to_stdout_and_the_rest_to_stderr(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(pairs_file), "--bundle", str(bundle)]) == 0
    out, err = capfdbinary.readouterr()
    assert rows_in(out) == expected_rows(bundle, pairs_file)
    assert b"fp32 (auto: " in err
    assert b"5 pairs scored in " in err
    assert b"1 blank lines" in err


def test_score_writes_a_file_that_appears_when_it_is_complete(
    bundle: Path, pairs_file: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = tmp_path / "scored.jsonl"
    output.write_text("of an earlier run")
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(output)]) == 0
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
    assert main(["score", str(bad_file), "--bundle", str(bundle), "-o", str(output)]) == 1
    partial = tmp_path / "scored.jsonl.partial"
    assert output.read_text() == "of an earlier run"
    assert [row["id"] for row in rows_in(partial.read_bytes())] == [0, 1, 2, 3, 4]
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert f"what was written before this is in {partial}".encode() in err


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
    assert b"1 bad lines skipped" in err


def test_score_uses_the_options_given(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    options = "--device cpu --precision int8 --threads 1 --max-batch-tokens 77 --score-field cappy".split()
    assert main(["score", str(pairs_file), "--bundle", str(bundle), *options]) == 0
    out, err = capfdbinary.readouterr()
    assert "int8 (asked for) on cpu (asked for), 1 thread, mode latency" in err.decode()
    assert "batches of up to 77 tokens, padding removed" in err.decode()
    assert all("cappy" in row and "score" not in row for row in rows_in(out))


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


def test_score_into_a_folder_that_is_not_there_is_an_error_that_names_it(
    bundle: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    output = pairs_file.parent / "absent" / "scored.jsonl"
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(output)]) == 1
    err = capfdbinary.readouterr().err
    assert b"cappy score: " in err
    assert b"absent" in err
    assert b"what was written before" not in err  # nothing was


def test_score_with_a_checkpoint_instead_of_a_bundle_is_an_error(
    checkpoint: Path, pairs_file: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["score", str(pairs_file), "--bundle", str(checkpoint)]) == 1
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert b"is not a bundle: it has no manifest.json; make one with 'cappy export'" in err


def test_an_output_link_is_followed_and_a_pipe_written_to(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, target, fifo = tmp_path / "link", tmp_path / "target", tmp_path / "fifo"
    target.write_text("of an earlier run")
    link.symlink_to(target)
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(link)]) == 0
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
    assert "the input has the name of our unfinished output" in capsys.readouterr().err
    assert source.read_bytes() == pairs_file.read_bytes()


# score, as a process


def test_score_works_in_a_pipe(bundle: Path, pairs_file: Path) -> None:
    done = cappy("score", "-", "--bundle", bundle, input=pairs_file.read_bytes())
    assert done.returncode == 0, done.stderr
    assert rows_in(done.stdout) == expected_rows(bundle, pairs_file)
    assert b"\r" not in done.stderr
    assert b"%|" not in done.stderr
    assert b" left" not in done.stderr


def test_score_into_head_ends_without_a_traceback(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text((json.dumps({"instruction": "q", "response": "a", "note": "x" * 2000}) + "\n") * 600)
    command = f'"{sys.executable}" -m cappy_engine score "{path}" --bundle "{bundle}" | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False)
    assert len(rows_in(done.stdout)) == 1
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert b"Broken pipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_score_to_a_full_disk_is_an_error_without_a_traceback(bundle: Path, pairs_file: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = cappy("score", pairs_file, "--bundle", bundle, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_score_names_the_partial_file_where_no_more_can_be_written(bundle: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "many.jsonl", tmp_path / "scored.jsonl"
    path.write_text((json.dumps({"instruction": "q", "response": "a", "note": "x" * 2000}) + "\n") * 300)
    output.write_text("of an earlier run")
    command = f'ulimit -f 64; "{sys.executable}" -m cappy_engine score "{path}" --bundle "{bundle}" -o "{output}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert b"File too large" in done.stderr
    assert b"Traceback" not in done.stderr
    assert output.read_text() == "of an earlier run"
    assert f"{output}.partial".encode() in done.stderr


def test_score_into_a_folder_is_refused_before_anything_is_scored(
    bundle: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    assert main(["score", str(pairs_file), "--bundle", str(bundle), "-o", str(tmp_path / "folder")]) == 1
    assert "must be a file, not a folder" in capsys.readouterr().err
    assert not (tmp_path / "folder.partial").exists()


def test_score_shows_its_speed_where_stderr_is_a_terminal(bundle: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "many.jsonl", tmp_path / "scored.jsonl"
    path.write_text((json.dumps({"instruction": "word " * 60, "response": "a"}) + "\n") * 6000)
    status, shown = run_on_terminal("score", path, "--bundle", bundle, "-o", output)
    assert status == 0, shown
    assert len(rows_in(output.read_bytes())) == 6000
    bars = [part for part in shown.split("\r") if "%|" in part and "pairs/s" in part]
    assert bars, shown
    assert all("tokens/s" in bar and " left" in bar for bar in bars)
    assert "6000 pairs scored in" in shown


def run_on_terminal(*arguments: str | Path) -> tuple[int, str]:
    """Run `cappy` with a terminal as stderr: its exit status, and what the terminal showed."""
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    command = [sys.executable, "-m", "cappy_engine", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr) as process:
        os.close(stderr)
        shown = b""
        with contextlib.suppress(OSError):  # Linux reports EIO when the other end is closed
            while part := os.read(terminal, 65536):
                shown += part
        status = process.wait(timeout=120)
    os.close(terminal)
    return status, shown.decode()


# rank


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
            "is_exact": False,
        }
        for candidate in ranked
    ]
    assert "Où?" in captured.out
    assert "1 of 2 pairs were truncated" in captured.err


def test_rank_on_a_terminal_that_is_not_utf8_ends_without_a_traceback(bundle: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = cappy("rank", "--bundle", bundle, "--instruction", "q", "--candidate", "Où?", env=environment)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
    assert b"O\\xf9?" in done.stdout


# inspect


def test_inspect_prints_what_the_bundle_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for fact in ("RobertaForSequenceClassification, 2 layers", "onnx/model_fp16.onnx", "parity with PyTorch", "int8"):
        assert fact in captured.out


def test_inspect_prints_the_manifest_as_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((bundle / MANIFEST).read_bytes())


# Wrong usage, help, missing things


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"examples:\n  cappy {command} " in out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"cappy {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "train",
        "score",
        "score pairs.jsonl --bundle b --precision bf16",
        "score pairs.jsonl --bundle b --device gpu",
        "score pairs.jsonl --bundle b --threads 0",
        "score pairs.jsonl --bundle b --threads two",
        "score pairs.jsonl --bundle b --max-batch-tokens -1",
        "score pairs.jsonl --bundle b --on-error ignore",
        "score pairs.jsonl --bundle b --batch-size 8",
        "score pairs.jsonl --bundle b --score-field=",
        "score pairs.jsonl --bundle b --score-field response",
        "rank --bundle b --instruction q",
        "export checkpoint out --precision fp64",
        "export checkpoint",
        "verify bundle",
        "adapt checkpoint train.jsonl",
        "adapt checkpoint train.jsonl out --held-out-fraction 1",
        "adapt checkpoint train.jsonl out --batch-size 0",
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "BUNDLE"],
        ["score", "/dev/null", "--bundle", "BUNDLE"],
        ["rank", "--bundle", "BUNDLE", "--instruction", "q", "--candidate", "a"],
        ["verify", "BUNDLE", "--checkpoint", "nowhere"],
    ],
)
def test_a_bundle_that_is_not_there_is_an_error_that_names_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "nowhere")
    assert main([missing if argument == "BUNDLE" else argument for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"cappy {arguments[0]}: no bundle at {missing}: it does not exist" in captured.err


@pytest.mark.parametrize("command", [["export", "checkpoint", "out"], ["verify", "bundle", "--checkpoint", "c"]])
def test_export_without_its_packages_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules['torch'] = None; from cappy_engine.cli.main import main; sys.exit(main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"needs the package 'torch'; run: pip install 'cappy-engine[cpu,export]'" in done.stderr
    assert b"Traceback" not in done.stderr


def test_scoring_needs_neither_torch_nor_transformers(bundle: Path, pairs_file: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'optimum', 'onnx', 'cappy_export']));"
        "from cappy_engine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "score", str(pairs_file), "--bundle", str(bundle)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert rows_in(done.stdout) == expected_rows(bundle, pairs_file)


@pytest.mark.parametrize("options", [["--limit", "nonsense"], ["--limit", "fp64.max_error=1"], ["--max-length", "-3"]])
def test_an_export_option_out_of_range_is_an_error_without_a_traceback(
    options: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["export", str(checkpoint), str(tmp_path / "out"), *options])
    except SystemExit as error:
        status = int(str(error.code))
    assert status in (1, 2)
    assert options[0].lstrip("-") in (err := capsys.readouterr().err) or options[1] in err
    assert not (tmp_path / "out").exists()
