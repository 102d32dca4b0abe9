"""Run a command as if packages were not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXPORTER = ("torch", "transformers", "onnx", "optimum", "accelerate", "safetensors", "huggingface_hub", "msgpack")
"""The packages of the extras `export` and `train`, but for rouge_score."""

CODE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from cappy_engine.cli.main import main
sys.exit(main({arguments!r}))
"""


def run_without(absent: Sequence[str], *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `cappy ARGUMENTS` in a process of its own, in which importing a package of `absent` fails."""
    code = CODE.format(absent=tuple(absent), arguments=[str(argument) for argument in arguments])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
