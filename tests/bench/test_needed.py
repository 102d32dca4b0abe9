"""Programs of the benchmarks that lack a package name it, and say how to install it, as `cappy bench run` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cappy_bench.needed import needed
from cappy_engine.errors import InstallationError

CODE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cappy_bench.studies.int8_options", "onnx"),
        ("cappy_bench.studies.token_ids", "transformers"),
        ("cappy_bench.make_checkpoint", "msgpack"),
    ],
)
def test_a_program_that_lacks_a_package_says_which_in_one_line(module: str, absent: str, tmp_path: Path) -> None:
    code = CODE.format(module=module, absent=absent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: this command needs the package '{absent}'; "
        "in a clone of cappy-engine, run: pip install -c constraints.txt '.[bench]'\n"
    )


def test_a_module_that_is_imported_ends_no_program() -> None:
    with pytest.raises(InstallationError, match="needs the package 'no_such_package'"), needed("bench", __name__):
        raise ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")
