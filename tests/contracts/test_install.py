"""Production: what `pip install '.[cpu]'` brings, and that it scores alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

TOPICS = ("World", "Sports", "Business", "Science and technology")
HEAVY = {"torch", "transformers", "onnx", "optimum", "safetensors", "msgpack"}


def run(*command: str | Path, folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_files_that_install_torch_name_the_same_version() -> None:
    environments = (ROOT / "benchmarks/cappy_bench/environments").glob("*.txt")
    files = (ROOT / "constraints.txt", ROOT / "Makefile", ROOT / "README.md", *environments)
    found = {path.name: re.findall(r"torch==([\d.]+)", path.read_text(encoding="utf-8")) for path in files}
    (version,) = found["constraints.txt"]
    assert found["Makefile"]
    assert found["README.md"]
    assert {each for versions in found.values() for each in versions} == {version}


@pytest.mark.slow
def test_the_cpu_extra_scores_without_torch_transformers_and_onnx(bundle: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python")
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", f"{ROOT}[cpu]", folder=tmp_path)
    installed = {entry["name"].lower() for entry in json.loads(run(*pip, "list", "--format", "json", folder=tmp_path))}
    assert "onnxruntime" in installed
    assert not installed & HEAVY

    instruction = (ROOT / "docs" / "examples" / "news.txt").read_text(encoding="utf-8")
    topics = [part for topic in TOPICS for part in ("--candidate", topic)]
    news = run(binaries / "cappy", "rank", "--json", "--instruction", instruction, *topics, folder=tmp_path)
    assert json.loads(news)[0]["response"] == "Business"  # by cappy-mini, which came with the package

    ranked = json.loads(
        run(
            *(binaries / "cappy", "rank", "--json", "--bundle", bundle, "--instruction", "Is the sky blue?"),
            *("--candidate", "Yes", "--candidate", "No"),
            folder=tmp_path,
        )
    )
    expected = json.loads(
        run(
            *(sys.executable, "-m", "cappy_engine", "rank", "--json", "--bundle", bundle),
            *("--instruction", "Is the sky blue?", "--candidate", "Yes", "--candidate", "No"),
            folder=tmp_path,
        )
    )
    assert ranked == expected

    exported = subprocess.run(
        [binaries / "cappy", "export", bundle, "new"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert exported.returncode == 1
    assert "pip install -c constraints.txt '.[cpu,export]'" in exported.stderr
