"""Wheels with the native library, where no compiler can be found. CAPPY_WHEELS names a folder of some to try.

Without it one is made with the system's compiler, if there is one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cappy_engine.cpu.built import why_no_library
from cappy_engine.cpu.kernels import find_kernels
from cappy_engine.native.build import LIBRARY, NOTE, machine
from tests.support.places import ROOT

pytestmark = pytest.mark.slow
INSIDE = "cappy_engine/native"
LIST_SOURCES = """
import os
from hatchling.builders.sdist import SdistBuilder
print(*(os.path.relpath(file.path) for file in SdistBuilder(".").recurse_included_files()), sep="\\n")
"""
ARGUMENTS = ("--instruction", "Is the sky blue?", "--candidate", "Yes", "--candidate", "No", "--precision", "int8")


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "CAPPY"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_wheel(folder: Path, source: Path = ROOT, **variables: str) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, folder=folder, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels to try, by their platform."""
    given = os.environ.get("CAPPY_WHEELS")
    if given:
        found = list((ROOT / given).glob("*.whl"))
        assert found, f"CAPPY_WHEELS, {given}, has no wheels"
    else:
        found = [make_wheel(tmp_path_factory.mktemp("wheel"))]
    return {path.stem.rpartition("-")[2]: path for path in found}


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of an environment in which nothing is found by its name alone."""
    return {"PATH": str(tmp_path_factory.mktemp("empty"))}


def test_a_wheel_with_the_library_is_for_its_systems_and_has_no_sources(wheels: dict[str, Path]) -> None:
    for platform, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as files:
            names = {Path(name).name for name in files.namelist() if name.startswith(INSIDE)}
            note = json.loads(files.read(f"{INSIDE}/{NOTE}"))
            of_the_checkpoint = [name for name in files.namelist() if "/checkpoint/" in name]
        assert of_the_checkpoint == ["cappy_mini/checkpoint/README.md"], "licences go with the weights"
        assert (LIBRARY in names) == (not note["problem"])
        assert not [name for name in names if name.endswith((".cpp", ".h"))]
        assert (platform == "any") == bool(note["problem"])
        assert note["problem"] or platform.endswith(note["machine"])
        assert platform != "any" or why_no_library(), "this machine has a compiler, but the wheel no library"


def test_a_library_for_all_systems_needs_no_new_ones(wheels: dict[str, Path]) -> None:
    for platform, wheel in wheels.items():
        if platform.startswith("manylinux"):
            with zipfile.ZipFile(wheel) as files:
                library = files.read(f"{INSIDE}/{LIBRARY}")
            needed = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_(\d+\.\d+)", library)}
            assert max(needed) <= (2, 17)
            assert b"libstdc++" not in library
            assert str(ROOT).encode() not in library


def test_a_wheel_scores_as_here_where_there_is_no_compiler(
    wheels: dict[str, Path], no_compiler: dict[str, str], tmp_path: Path
) -> None:
    wheel = wheels.get(f"linux_{machine()}") or wheels.get(f"manylinux_2_17_{machine()}") or wheels["any"]
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python")
    install = ("install", "-q", "--no-compile", "-c", ROOT / "constraints.txt")
    run(*pip, *install, f"{wheel}[cpu]", folder=tmp_path, **no_compiler)
    doctor = run(binaries / "cappy", "doctor", folder=tmp_path, **no_compiler)
    assert ("; compiled by " in doctor) == (wheel != wheels.get("any") and find_kernels().library is not None), doctor
    there = json.loads(run(binaries / "cappy", "rank", "--json", *ARGUMENTS, folder=tmp_path, **no_compiler))
    here = json.loads(run(sys.executable, "-m", "cappy_engine", "rank", "--json", *ARGUMENTS, folder=ROOT / "engine"))
    assert [each["response"] for each in there] == [each["response"] for each in here]
    assert [each["score"] for each in there] == pytest.approx([each["score"] for each in here], abs=1e-5)


def test_without_a_compiler_the_package_is_for_every_system(no_compiler: dict[str, str], tmp_path: Path) -> None:
    """Also from a copy that git does not know, in which an earlier build left a library."""
    unwanted = shutil.ignore_patterns(".*", "checkpoint", "results", "dist", "docs", "tests", "bench", "demo")
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=unwanted))
    (copy / "engine" / INSIDE / LIBRARY).write_bytes(b"an old library")
    (copy / "engine" / INSIDE / NOTE).write_text("an old note")
    wheel = make_wheel(tmp_path, copy, **no_compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        assert f"{INSIDE}/{LIBRARY}" not in files.namelist()
        assert files.namelist().count(f"{INSIDE}/{NOTE}") == 1
        assert "there is no C++ compiler" in json.loads(files.read(f"{INSIDE}/{NOTE}"))["problem"]


def test_a_source_distribution_is_complete_where_links_lead_to_the_packages(tmp_path: Path) -> None:
    """As those of an environment of another tool, which the benchmarks make somewhere in the clone."""
    python = ROOT / ".venv-wheel" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs what `make wheel` installs")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.so", NOTE, "bench", "build", "dist", "demo", "models")
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=unwanted))
    (copy / "bench").mkdir()
    (copy / "bench" / "cappy_engine").symlink_to(copy / "engine" / "cappy_engine")
    listed = run(python, "-c", LIST_SOURCES, folder=copy).splitlines()
    tops = ("engine", "export", "benchmarks", "docs", "tests")
    there = [str(path.relative_to(copy)) for top in tops for path in (copy / top).rglob("*") if path.is_file()]
    assert sorted(name for name in listed if name.split("/")[0] in tops) == sorted(there)
    assert not [name for name in listed if name.startswith("bench/")]
