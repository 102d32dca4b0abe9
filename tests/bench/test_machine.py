"""A result names the commit of the code that was measured, also where that was changed since, and the processor.

And how fast that is at most.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cappy_bench
from cappy_bench.machine import current_commit, describe_machine, processor_numbers
from cappy_bench.speed import measure as measuring
from cappy_bench.speed import peak
from cappy_bench.speed.run_options import RunOptions


def test_a_copy_of_the_package_has_no_commit_even_inside_of_a_repository(tmp_path: Path) -> None:
    assert re.fullmatch("[0-9a-f]{12}(-dirty)?", current_commit() or "")
    installed = tmp_path / "site-packages" / "cappy_bench"
    installed.mkdir(parents=True)
    for name in ("__init__.py", "machine.py"):
        shutil.copyfile(Path(cappy_bench.__path__[0]) / name, installed / name)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "somebody's own"], check=True)
    code = "import cappy_bench.machine as machine; print(machine.__file__, machine.current_commit())"
    path = os.pathsep.join([str(installed.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(installed / "machine.py"), "None"]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (
            "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R)\nstepping\t: 2\n\n"
            "processor\t: 1\ncpu family\t: 7\nmodel\t\t: 1\n",
            {"cpu_family": "6", "cpu_model": "207", "cpu_stepping": "2"},
        ),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\nCPU revision\t: 1\n",
            {"cpu_family": "0x41", "cpu_model": "0xd40", "cpu_stepping": "1"},
        ),
        ("processor\t: 0\n", {}),
        (None, {}),
    ],
    ids=["x86", "ARM", "nothing told", "no file"],
)
def test_a_processor_is_told_from_others_of_its_name(text: str | None, numbers: dict[str, str], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert processor_numbers(tmp_path / "cpuinfo") == numbers
    assert describe_machine().items() >= processor_numbers().items()


def commit_of(package: Path) -> str:
    """What a copy of our package says of itself."""
    code = "import cappy_bench.machine as machine; print(machine.current_commit())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path])}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_code_that_was_changed_since_its_commit_is_marked(tmp_path: Path) -> None:
    package, results = tmp_path / "benchmarks" / "cappy_bench", tmp_path / "benchmarks" / "results"
    package.mkdir(parents=True)
    results.mkdir()
    for name in ("__init__.py", "machine.py"):
        shutil.copyfile(Path(cappy_bench.__path__[0]) / name, package / name)
    (results / "README.md").write_text("a report")
    (tmp_path / ".gitignore").write_text("__pycache__/")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    clean = commit_of(package)
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (results / "README.md").write_text("the report of the run before")
    assert commit_of(package) == clean
    (package / "added.py").write_text("speed = 2")
    assert commit_of(package) == f"{clean}-dirty"
    (package / "added.py").unlink()
    (package / "__init__.py").write_text("speed = 2")
    assert commit_of(package) == f"{clean}-dirty"


def test_the_commit_is_read_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = ["before"]

    def run_suite(*asked: object, notes: Path, **others: object) -> dict[str, object]:
        commits.append("after")
        notes.touch()
        return {"workloads": [], "runners": []}

    monkeypatch.setattr(measuring, "current_commit", lambda: commits[-1])
    monkeypatch.setattr(measuring, "run_suite", run_suite)
    monkeypatch.setattr(measuring, "_take_workloads", lambda *asked: ([], "none"))
    options = RunOptions(suite="smoke", work=tmp_path / "work", out=tmp_path / "result.json")
    assert measuring.measure(options, say=print)["commit"] == "before"


def test_a_peak_is_of_two_operations_a_step_in_the_fastest_product_and_hopeless_ones_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[float] = []
    seconds = {"one": 1.0, "other": 0.5, "a little": 4.0, "hopeless": 6.0}

    def products(shape: tuple[int, int, int], threads: int) -> Iterator[tuple[str, str, float]]:
        for precision, how in (("fp32", "one"), ("fp32", "other"), ("int8", "a little"), ("int8", "hopeless")):
            yield precision, how, seconds[how] + (shape[0] == 7)

    def fastest(product: float, share: float) -> float:
        timed.append(product)
        return product

    monkeypatch.setattr(peak, "SHAPES", ((5, 2, 3), (7, 2, 3)))
    monkeypatch.setattr(peak, "_products", products)
    monkeypatch.setattr(peak, "_fastest", fastest)
    found = peak.measure_peak(threads=torch.get_num_threads(), seconds=1.0)
    assert found["fp32"] == {"flops": 2 * 5 * 2 * 3 / 0.5, "how": "other, 5 x 2 x 3"}
    assert found["int8"] == {"flops": pytest.approx(2 * 7 * 2 * 3 / 5), "how": "a little, 7 x 2 x 3"}
    assert timed == [1.0, 0.5, 4.0, 6.0, 2.0, 1.5, 5.0]


def test_the_time_of_a_product_is_its_shortest_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3, 1 and 5 seconds, where there are 8: no other begins after that."""
    times = iter([0.0, 0.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0, 9.0, 9.0])
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert peak._fastest(lambda: None, 8.0) == 1.0
