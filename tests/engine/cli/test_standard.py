"""Whatever stdin, stdout and stderr are, and whichever signal comes: results are kept apart, and words are said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_engine.cli import bundles
from cappy_engine.cli.main import main
from cappy_engine.cli.streams import complain, say, show, tell
from cappy_engine.errors import BundleError
from tests.support.command_line import CAPPY, cappy, in_shell, rows_in


@pytest.mark.slow
def test_without_a_stderr_the_results_are_all_that_is_on_stdout(bundle: Path, pairs_file: Path) -> None:
    done = in_shell(f"{CAPPY} score pairs.jsonl --bundle {bundle} --verbose 2>&-", pairs_file.parent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [row["id"] for row in rows_in(done.stdout)] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_without_a_stdout_results_are_an_error_and_files_are_written(bundle: Path, pairs_file: Path) -> None:
    for words in (f"score pairs.jsonl --bundle {bundle}", "score pairs.jsonl -o /dev/stdout", f"inspect {bundle}"):
        done = in_shell(f"{CAPPY} {words} >&-", pairs_file.parent)
        assert done.returncode == 1
        assert b"closed" in done.stderr
        assert b"Traceback" not in done.stderr
    done = in_shell(f"{CAPPY} score pairs.jsonl --bundle {bundle} -o out.jsonl <&- >&- 2>&-", pairs_file.parent)
    assert done.returncode == 0
    assert len(rows_in((pairs_file.parent / "out.jsonl").read_bytes())) == 5


def test_without_a_stdin_reading_it_is_an_error(bundle: Path, tmp_path: Path) -> None:
    done = in_shell(f"{CAPPY} rank --bundle {bundle} --instruction - --candidate a <&-", tmp_path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"cappy rank: stdin is closed, so there is nothing to read from it; name a file\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("words", "status"),
    [("inspect >/dev/full", 1), ("--help >/dev/full", 1), ("tune x 2>/dev/full", 1),
     ("rank --instruction a --candidate b >/dev/full", 1), ("rank --instruction a --candidate b --json >/dev/full", 1)],
)  # fmt: skip
@pytest.mark.parametrize("buffered", ["", "PYTHONUNBUFFERED=1 "], ids=["buffered", "unbuffered"])
def test_streams_that_are_full_are_no_traceback(words: str, status: int, buffered: str, tmp_path: Path) -> None:
    done = in_shell(f"unset PYTHONUNBUFFERED; {buffered}{CAPPY} {words}", tmp_path)
    assert done.returncode == status
    assert (b": stdout: No space left on device\n" in done.stderr) == ("2>" not in words)
    assert b"Exception ignored" not in done.stderr


def test_what_was_printed_before_an_error_is_not_lost(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import click, sys\nfrom cappy_engine.cli.standard import standard_streams\n"
        "with standard_streams():\n    click.echo('first')\n    sys.stdout.write('last')\n    raise RuntimeError\n"
    )
    done = in_shell(f"unset PYTHONUNBUFFERED; {sys.executable} {program}", tmp_path)
    assert done.stdout == b"first\nlast"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("is_first", [False, True], ids=["a process", "process 1"])
def test_a_signal_to_end_leaves_what_was_scored_and_says_so(
    number: signal.Signals, is_first: bool, bundle: Path, tmp_path: Path
) -> None:
    if is_first and (number != signal.SIGTERM or in_shell("unshare --pid --fork true", tmp_path).returncode):
        pytest.skip("process 1 is asked to end by SIGTERM; and it needs the right to make namespaces")
    command = f"exec {CAPPY} score - --bundle {bundle} -o out.jsonl"
    words = ["unshare", "--pid", "--fork"] if is_first else []
    partial = tmp_path / "out.jsonl.partial"
    with subprocess.Popen(
        [*words, "bash", "-c", command],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"instruction": "q", "response": "a"}\n' * 3 + b'{"instruc')
        process.stdin.flush()
        for _ in range(1000):
            if partial.exists() and partial.stat().st_size:
                break
            time.sleep(0.02)
        written = rows_in(partial.read_bytes())  # though the input goes on
        target = process.pid
        if is_first:
            target = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(target, number)
        process.wait(timeout=60)  # communicate would close its input at once, which may come before the signal
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert [row["response"] for row in written] == ["a"] * 3
    assert rows_in(partial.read_bytes()) == written
    assert err.endswith(
        f"what was written before this is in {partial.resolve()}\ncappy score: ended by {number.name}\n".encode()
    )


def test_signals_are_as_they_were_when_a_command_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    streams = (sys.stdin, sys.stdout, sys.stderr)
    assert main(["--version"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    assert (sys.stdin, sys.stdout, sys.stderr) == streams


def test_what_is_logged_cannot_steer_the_terminal(bundle: Path, tmp_path: Path) -> None:
    name = "a\x1b[2Jb"
    (tmp_path / f".{name}.partial-1").mkdir()  # as of a command that was killed: a warning is logged
    done = cappy("slim", str(bundle), "--keep", "int8", "--target", "cpu", "--out", str(tmp_path / name))
    assert (done.returncode, done.stdout.count(b"a\xc2\xb7[2Jb")) == (0, 1)
    assert b"WARNING: note: " in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("write", [show, tell, say, complain])
def test_no_text_for_people_can_steer_the_terminal(
    write: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write("one line\nÄhre \x1b[31mrot\u202e\r\x9b2J")
    captured = capsys.readouterr()
    assert captured.out + captured.err == "one line\nÄhre ·[31mrot···2J\n"


def test_a_signal_that_a_library_takes_for_a_bad_file_is_still_what_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where it comes while code in C or Rust calls Python."""

    def interrupted(path: Path) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as error:
            raise BundleError(f"{path} cannot be read") from error

    monkeypatch.setattr(bundles, "open_bundle", interrupted)
    assert main(["inspect"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "cappy inspect: ended by SIGTERM\n"
    monkeypatch.undo()
    assert main(["inspect"]) == 0
