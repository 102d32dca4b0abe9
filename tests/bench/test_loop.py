"""The whole loop of `docs/examples/loop`, as people run it: sample, adapt, export, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cappy_engine.cli.main import main
from tests.support.places import ROOT, write_short_parity_pairs

SCRIPT = ["bash", str(ROOT / "docs" / "examples" / "loop" / "run.sh")]


def test_a_missing_package_is_said_before_the_first_step(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without the installed packages
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "loop")}
    done = subprocess.run(SCRIPT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "rouge_score, matplotlib; in a clone of cappy-engine, run: pip install" in done.stderr
    assert not (tmp_path / "loop").exists()


@pytest.mark.slow
def test_the_loop_improves_rouge_l_over_a_random_pick(
    preloaded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loop"
    pairs = write_short_parity_pairs(tmp_path / "pairs.jsonl")
    environment = {
        **os.environ,
        "PATH": f"{preloaded}{os.pathsep}{os.environ['PATH']}",
        "OUT": str(out),
        "EXPORT_OPTIONS": f"--pairs {pairs}",
    }
    first = subprocess.run(SCRIPT, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "oracle" in first.stdout
    assert (out / "rouge.svg").is_file()

    command = ["evaluate", "bigbench", str(out / "samples"), "--bundle", str(out / "bundle"), "--json"]
    assert main([*command, "--precision", "fp32", "--precision", "int8", "--against", str(out / "adapted")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"]["PyTorch above random"]["low"] > 0.1
    assert found["agreement"]["fp32 against PyTorch"]["share"] == 1
    means = {name: part["mean"]["mean"] for name, part in found["averages"].items()}
    assert means["random"] < means["int8"] <= means["oracle"]

    again = subprocess.run(SCRIPT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stderr.count(" exists") == 4
    assert "oracle" in again.stdout
    assert first.stdout.endswith(again.stdout)  # no step but the evaluation was done again
