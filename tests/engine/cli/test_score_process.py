"""`cappy score` as a process: in a pipe, on a full disk, on a terminal, and without the exporter's packages."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import cappy, expected_rows, rows_in, run_on_terminal

pytestmark = pytest.mark.slow


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
    assert done.stderr.endswith(b"cappy score: stdout: No space left on device\n")
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_score_names_the_partial_file_where_no_more_can_be_written(bundle: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "many.jsonl", tmp_path / "scored.jsonl"
    path.write_text((json.dumps({"instruction": "q", "response": "a", "note": "x" * 2000}) + "\n") * 300)
    output.write_text("of an earlier run")
    command = (
        f'ulimit -f 64; "{sys.executable}" -m cappy_engine score "{path}" --bundle "{bundle}" -o "{output}" --force'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert b"File too large" in done.stderr
    assert b"Traceback" not in done.stderr
    assert output.read_text() == "of an earlier run"
    assert f"{output}.partial".encode() in done.stderr


def test_score_shows_its_speed_where_stderr_is_a_terminal(bundle: Path, tmp_path: Path) -> None:
    path, output = tmp_path / "many.jsonl", tmp_path / "scored.jsonl"
    rows = (
        {"instruction": f"{'word ' * 60}{number}", "response": "a"} for number in range(6000)
    )  # equal ones are fast
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, shown = run_on_terminal("score", path, "--bundle", bundle, "-o", output)
    assert status == 0, shown
    assert len(rows_in(output.read_bytes())) == 6000
    bars = [part for part in shown.split("\r") if "%|" in part and "pairs/s" in part]
    assert bars, shown
    assert all("tokens/s" in bar and " left" in bar for bar in bars)
    assert "6000 pairs scored in" in shown


def test_scoring_needs_neither_torch_nor_transformers(bundle: Path, pairs_file: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'optimum', 'onnx', 'cappy_export']));"
        "from cappy_engine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "score", str(pairs_file), "--bundle", str(bundle)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert rows_in(done.stdout) == expected_rows(bundle, pairs_file)


def test_score_shows_no_bar_on_a_terminal_if_it_is_to_be_quiet(bundle: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored.jsonl"
    status, shown = run_on_terminal("score", pairs_file, "--bundle", bundle, "-o", output, "--quiet")
    assert (status, shown) == (0, "")
    assert rows_in(output.read_bytes()) == expected_rows(bundle, pairs_file)


def test_an_interrupt_ends_with_130_and_without_a_traceback(bundle: Path) -> None:
    command = [sys.executable, "-m", "cappy_engine", "score", "-", "--bundle", str(bundle)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        assert b"fp32 on cpu" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)  # communicate would close its input at once, which may come before the signal
        _, err = process.communicate()
    assert (process.returncode, err) == (130, b"cappy score: interrupted\n")


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_is_ended_while_it_is_imported_has_a_name(name: str, status: int) -> None:
    code = f"""
import os, signal, sys
from cappy_engine.cli.main import main

class Signals:
    def find_spec(self, module, path=None, target=None):
        if module == "cappy_engine.cli.scoring":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Signals())
raise SystemExit(main())
"""
    done = subprocess.run([sys.executable, "-c", code, "score", "-"], capture_output=True, timeout=60, check=False)
    assert done.returncode == status
    said = {130: "interrupted", 143: "ended by SIGTERM"}[status]
    assert done.stderr.decode() == f"cappy score: {said}\n"
