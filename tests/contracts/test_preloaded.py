"""A program that finds PyTorch imported finds nothing else that it would not find if Python started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_program_finds_the_modules_that_python_would_find(preloaded: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("name = 'beside'")
    (tmp_path / "script.py").write_text("import beside; print(beside.name)")
    programs = [
        [str(tmp_path / "script.py")],
        ["-c", "import cappy_engine, cappy_export; print(cappy_engine.__file__)"],
        ["-c", "import tests"],
        ["-c", "import beside"],
        ["-P", "-c", "import beside"],
    ]
    for program in programs:
        ends = [
            subprocess.run([python, *program], cwd="/", capture_output=True, text=True, check=False)
            for python in (sys.executable, preloaded / "python")
        ]
        assert (ends[0].returncode, ends[0].stdout) == (ends[1].returncode, ends[1].stdout), program


def test_it_has_imported_pytorch_and_transformers(preloaded: Path) -> None:
    code = "import sys; print({'torch', 'transformers'} <= set(sys.modules))"
    assert (
        subprocess.run([preloaded / "python", "-c", code], capture_output=True, text=True, check=True).stdout
        == "True\n"
    )


def test_what_it_has_imported_has_read_the_programs_own_environment(preloaded: Path) -> None:
    code = "import os; from huggingface_hub import constants; print(constants.HF_HOME, os.environ['LAST'])"
    for home, last in (("/one", "1"), ("/two", "2"), ("/one", "3")):
        environment = {**os.environ, "HF_HOME": home, "LAST": last}
        command = [str(preloaded / "python"), "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{home} {last}\n"
