"""How the native library gets its compiler, and what is noted where there is none. No compiler is run but fake ones."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_engine.cpu.built import why_no_library
from cappy_engine.native import build as native
from cappy_engine.native.build import LIBRARY, NOTE, BuildFailed, Built, provide

FAKE = """
import sys
from pathlib import Path
if sys.argv[1:] == ["--version"]:
    print("fake 1.0\\nof nobody")
    sys.exit()
with open({log!r}, "a", encoding="utf-8") as log:
    print(*sys.argv[1:], file=log)
if {complaint!r}:
    sys.exit({complaint!r})
Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"a library")
"""

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Make CXX a compiler that writes down its calls, in the file that is returned; with a `complaint` it fails."""

    def make(complaint: str = "") -> Path:
        program, log = tmp_path / "fake.py", tmp_path / "calls"
        program.write_text(FAKE.format(log=str(log), complaint=complaint), encoding="utf-8")
        log.touch()
        monkeypatch.setenv("CXX", shlex.join([sys.executable, str(program)]))
        return log

    return make


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all compilers away."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(native, "_find_zig", list)


@pytest.mark.slow
def test_a_compiler_that_works_leaves_a_library_and_a_note(fake: Fake, tmp_path: Path) -> None:
    fake()
    found = provide(tmp_path)
    assert found == Built(native.machine(), native.digest(native.machine()), compiler="fake 1.0")
    assert (tmp_path / LIBRARY).read_bytes() == b"a library"
    assert native.read_note(tmp_path) == found
    assert why_no_library(tmp_path) == ""
    assert {path.name for path in tmp_path.iterdir()} == {LIBRARY, NOTE, "fake.py", "calls"}


@pytest.mark.slow
def test_the_flags_are_for_any_processor_of_its_kind(fake: Fake, tmp_path: Path) -> None:
    log = fake()
    native.build(tmp_path, shlex.split(os.environ["CXX"]), kind="x86_64")
    calls = {line.partition(" -c ")[2].partition(" ")[0]: line for line in log.read_text().splitlines()}
    assert "-march=native" not in log.read_text()
    assert "-mavx2" not in calls["library.cpp"]
    assert "-mavx512vnni" in calls["linear_avx512vnni.cpp"]
    assert "-mavx512f" not in calls["linear_avx2.cpp"]


def test_what_is_for_another_kind_of_processor_is_left_out() -> None:
    names = {path.name for path in native.sources_for("aarch64")}
    assert "linear_scalar.cpp" in names
    assert not [name for name in names if "avx" in name]
    assert {"linear_i8mm.cpp", "attention_neon.cpp"} < names
    assert not [path for path in native.sources_for("x86_64") if path.stem.endswith(("_neon", "_dotprod", "_i8mm"))]


@pytest.mark.slow
def test_nothing_is_compiled_again_until_a_source_changes(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake()
    provide(tmp_path)
    once = log.read_text()
    provide(tmp_path)
    assert log.read_text() == once
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O2"))
    provide(tmp_path)
    assert len(log.read_text()) > len(once)


@pytest.mark.slow
def test_a_library_that_was_removed_is_made_again(fake: Fake, tmp_path: Path) -> None:
    fake()
    provide(tmp_path)
    (tmp_path / LIBRARY).unlink()
    assert "is not there" in why_no_library(tmp_path)
    provide(tmp_path)
    assert why_no_library(tmp_path) == ""


@pytest.mark.slow
def test_a_compiler_that_fails_is_noted_and_no_old_library_is_left(fake: Fake, tmp_path: Path) -> None:
    fake()
    provide(tmp_path)
    (tmp_path / NOTE).unlink()
    fake("linear.cpp:7: error: no such thing")
    found = provide(tmp_path)
    assert "fake 1.0 did not compile them: linear.cpp:7: error: no such thing" in found.problem
    assert found.problem in why_no_library(tmp_path)
    assert not (tmp_path / LIBRARY).exists()


def test_an_error_behind_many_warnings_is_told(fake: Fake, tmp_path: Path) -> None:
    """As an old assembler's, behind what gcc 12 warns of in its own headers."""
    warnings = "linear.cpp:7: warning: who knows\n" * 1000
    fake(f"{warnings}/tmp/cc.s:23: Error: no such instruction\n{'and more' * 1000}")
    said = provide(tmp_path).problem
    assert "did not compile them: /tmp/cc.s:23: Error: no such instruction\nand more" in said
    assert len(said) < 3000
    fake(warnings)
    assert "did not compile them: linear.cpp:7: warning: who knows" in provide(tmp_path).problem


@pytest.mark.slow
def test_zig_is_tried_where_the_system_s_compiler_fails(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = tmp_path / "zig"
    log = fake()
    working.write_text(f"#!{sys.executable}\n{(tmp_path / 'fake.py').read_text()}", encoding="utf-8")
    working.chmod(0o755)
    fake("too old")
    monkeypatch.setattr(native, "_find_zig", lambda: [str(working)])
    found = provide(tmp_path)
    assert found.problem == ""
    assert found.compiler.endswith(f"for {native.machine()}-linux-gnu.2.17")
    assert f"c++ -target {native.machine()}-linux-gnu.2.17" in log.read_text()


@pytest.mark.usefixtures("bare")
def test_without_a_compiler_the_reason_is_noted(tmp_path: Path) -> None:
    found = provide(tmp_path)
    assert found.compiler == ""
    assert found.problem == "there is no C++ compiler (CXX, c++, g++, clang++), and ziglang is not installed"
    assert why_no_library(tmp_path) == found.problem


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("named", ["no-such-compiler", 'c++ "'])
def test_cxx_that_names_no_program_is_passed_over(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    assert provide(tmp_path).problem.startswith("there is no C++ compiler (CXX, ")


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("cc", "there is no C\\+\\+ compiler \\(CXX, c\\+\\+, g\\+\\+, clang\\+\\+\\)$"),
        ("zig", "ziglang is not installed; run: pip install ziglang$"),
        ("manylinux-aarch64", "ziglang is not installed; run: pip install ziglang$"),
    ],
)
def test_a_compiler_that_is_asked_for_by_name_is_used_or_an_error(asked: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match=reason):
        provide(tmp_path, asked)


@pytest.mark.slow
def test_none_removes_the_library_and_says_so(fake: Fake, tmp_path: Path) -> None:
    fake()
    provide(tmp_path)
    provide(tmp_path, "none")
    assert not (tmp_path / LIBRARY).exists()
    assert why_no_library(tmp_path) == "they were switched off by CAPPY_BUILD=none"


def test_an_unknown_compiler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CAPPY_BUILD is 'gcc'; choose from auto, cc, zig, "):
        provide(tmp_path, "gcc")


def test_other_systems_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "machine", lambda: "macosx-14.0-arm64")
    assert provide(tmp_path).problem == "there are none for macosx-14.0-arm64, only for Linux on x86_64 and aarch64"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"machine": "x86_64"}', '{"other": 1}'])
def test_a_damaged_note_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / NOTE).write_text(content, encoding="utf-8")
    assert native.read_note(tmp_path) is None
    assert "never compiled" in why_no_library(tmp_path)


def test_a_library_of_other_sources_is_told_apart_where_there_are_sources(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).touch()
    (tmp_path / NOTE).write_text(json.dumps({"machine": "x86_64", "digest": "old", "compiler": "c++"}))
    assert why_no_library(tmp_path) == ""  # as in a wheel
    (tmp_path / "linear.cpp").touch()
    assert "sources changed" in why_no_library(tmp_path)
