"""Call `cappy` as people do: as a process of its own, in a pipe, or on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shlex
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer

LONG = "The sky is blue, and so on. " * 200
"""A text that is truncated."""
CAPPY = f"{shlex.quote(sys.executable)} -m cappy_engine"
"""The command line, for a shell."""


def in_shell(command: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, timeout=120, check=False)


def write_pairs(path: Path) -> Path:
    """Write five good rows with a blank line among them."""
    rows = [{"id": number, "instruction": "Où? ", "response": "word " * number} for number in range(5)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join([*lines[:2], "\n", *lines[2:]]))
    return path


def write_bad_pairs(path: Path) -> Path:
    """Write the rows of `write_pairs`, then a bad line, then one more row."""
    write_pairs(path)
    path.write_bytes(path.read_bytes() + b'{"instruction": "q"}\n{"instruction": "q", "response": "last"}\n')
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
