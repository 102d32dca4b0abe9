"""What is kept of TensorRT: built once, for one model on one GPU, and used only if not a byte of it was changed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.errors import DeviceUnavailable
from cappy_engine.gpu.engines import EngineCache, engine_facts, engine_folder, engine_key

GPU = {"name": "some GPU", "compute_capability": "9.0", "driver": "580.95"}
VERSIONS = {"tensorrt": "10.13", "onnxruntime": "1.31.1"}
OPTIONS = {"trt_fp16_enable": "True", "trt_engine_cache_path": "/here", "trt_timing_cache_path": "/here"}
SAME: dict[str, Any] = {
    "model_sha256": ["ab" * 32, "cd" * 32],
    "precision": "fp16",
    "profile_text": "input_ids:1x16",
    "options": OPTIONS,
    "gpu": GPU,
    "versions": VERSIONS,
}
FACTS = engine_facts(**SAME)
KEY = engine_key(FACTS)
ENGINE = "model_sm90.engine"


class Runtime:
    """Keeps engines as ONNX Runtime does: takes the one of the right name, whatever its weights, else builds it.

    A "session" is the engine's content; `found` is what lay in the folder each time one was opened.
    """

    def __init__(self, weights: str = "weights") -> None:
        self.weights = weights
        self.found: list[list[str]] = []

    def session(self, folder: Path) -> str:
        self.found.append(sorted(path.name for path in folder.iterdir()))
        engine = folder / ENGINE
        if not engine.exists():
            engine.write_text(f"engine of {self.weights}")
            (folder / "model.timing").write_text("timing")
        return engine.read_text()


def kept(root: Path) -> list[str]:
    """The names of all in `root` but for the locks."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "engines"


@pytest.fixture
def folder(root: Path) -> Path:
    """The folder of an engine that is kept under KEY."""
    EngineCache(root).open(KEY, FACTS, Runtime().session)
    return root / KEY


def test_an_engine_is_built_once_and_then_reused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime()
    with caplog.at_level(logging.WARNING):
        sessions = [EngineCache(root).open(KEY, FACTS, runtime.session) for _ in range(3)]
    assert sessions == ["engine of weights"] * 3
    files = ["manifest.json", "model.timing", ENGINE]
    assert runtime.found == [[], files, files]
    assert kept(root) == [KEY]
    assert not caplog.records


def test_swapped_weights_get_an_engine_of_their_own(root: Path) -> None:
    swapped = engine_facts(**{**SAME, "model_sha256": ["ef" * 32, "cd" * 32]})
    assert EngineCache(root).open(KEY, FACTS, Runtime("old").session) == "engine of old"
    assert EngineCache(root).open(engine_key(swapped), swapped, Runtime("new").session) == "engine of new"
    assert kept(root) == sorted([KEY, engine_key(swapped)])


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / ENGINE).read_bytes())
    content[3] ^= 1
    (folder / ENGINE).write_bytes(content)


def replace_by_link(path: Path) -> None:
    """The same bytes, but elsewhere, where others may change them."""
    elsewhere = path.parent.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("engine")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "manifest.json").read_bytes())
    change(document)
    (folder / "manifest.json").write_text(json.dumps(document))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte of the engine": flip_a_byte,
    "an engine cut short": lambda folder: truncate(folder / ENGINE),
    "an added file": lambda folder: (folder / "plugin.so").write_bytes(b"native code"),
    "an added folder": lambda folder: (folder / "more").mkdir(),
    "a removed file": lambda folder: (folder / ENGINE).unlink(),
    "a renamed file": lambda folder: (folder / ENGINE).rename(folder / "other.engine"),
    "a link for an engine": lambda folder: replace_by_link(folder / ENGINE),
    "a link for a manifest": lambda folder: replace_by_link(folder / "manifest.json"),
    "a link for a folder": replace_by_link,
    "a file for a folder": replace_by_file,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a manifest cut short": lambda folder: truncate(folder / "manifest.json"),
    "a manifest of bytes": lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    "a manifest that is none": lambda folder: (folder / "manifest.json").write_text("[]"),
    "an edited manifest": lambda folder: change_manifest(folder, lambda manifest: manifest["facts"].clear()),
    "an edited list of files": lambda folder: change_manifest(folder, lambda manifest: manifest["files"].clear()),
    "a folder its group can write": lambda folder: folder.chmod(0o770),
    "a folder others can read": lambda folder: folder.chmod(0o705),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_engine_that_is_not_as_it_was_kept_is_built_again(
    root: Path, folder: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder)
    runtime = Runtime("new")
    with caplog.at_level(logging.WARNING):
        assert EngineCache(root).open(KEY, FACTS, runtime.session) == "engine of new"
    assert runtime.found == [[]]
    assert f"the engine in {folder} is not used but built again: " in caplog.text
    assert EngineCache(root).open(KEY, FACTS, runtime.session) == "engine of new"
    assert len(runtime.found[1]) == 3
    assert kept(root) == [KEY]


def test_a_link_is_removed_and_not_what_it_leads_to(root: Path, folder: Path, tmp_path: Path) -> None:
    replace_by_link(folder)
    (elsewhere,) = tmp_path.rglob("elsewhere")
    EngineCache(root).open(KEY, FACTS, Runtime("new").session)
    assert not folder.is_symlink()
    assert (elsewhere / ENGINE).read_text() == "engine of weights"


def test_an_engine_that_was_built_for_something_else_is_built_again(root: Path, folder: Path) -> None:
    other = engine_facts(**{**SAME, "precision": "fp32"})
    assert EngineCache(root).open(folder.name, other, Runtime("other").session) == "engine of other"
    assert EngineCache(root).open(folder.name, FACTS, Runtime("first").session) == "engine of first"


def test_what_tensorrt_adds_when_it_opens_an_engine_is_kept_too(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime()

    def add(folder: Path) -> str:
        (folder / "more.timing").write_text("timing")
        (folder / "model.timing").write_text("a longer timing")
        return runtime.session(folder)

    with caplog.at_level(logging.WARNING):
        EngineCache(root).open(KEY, FACTS, add)
    assert "TensorRT changed model.timing, more.timing" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        EngineCache(root).open(KEY, FACTS, runtime.session)
    assert runtime.found[-1] == ["manifest.json", "model.timing", ENGINE, "more.timing"]
    assert not caplog.records
    assert kept(root) == [KEY]


def fail(folder: Path) -> str:
    (folder / ENGINE).write_text("half")
    raise OSError("out of GPU memory")


def test_a_build_that_raised_leaves_nothing(root: Path) -> None:
    with pytest.raises(OSError, match="out of GPU memory"):
        EngineCache(root).open(KEY, FACTS, fail)
    assert kept(root) == []
    assert EngineCache(root).open(KEY, FACTS, Runtime().session) == "engine of weights"


def test_an_engine_that_did_not_open_is_kept_unless_it_was_changed(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> str:
        raise MemoryError

    with pytest.raises(MemoryError):
        EngineCache(root).open(KEY, FACTS, refuse)
    assert f"the engine in {folder} is as it was built, but did not open; remove it if this goes on" in caplog.text
    assert EngineCache(root).open(KEY, FACTS, Runtime("new").session) == "engine of weights"
    with pytest.raises(OSError, match="out of GPU memory"):
        EngineCache(root).open(KEY, FACTS, fail)
    assert EngineCache(root).open(KEY, FACTS, Runtime("new").session) == "engine of new"


def test_a_build_that_writes_nothing_is_not_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert EngineCache(root).open(KEY, FACTS, lambda folder: "session") == "session"
    assert "TensorRT stored no engine" in caplog.text
    assert kept(root) == []


KILLED = """
import json, sys, time
from pathlib import Path
from cappy_engine.gpu.engines import EngineCache

def make(folder):
    (folder / sys.argv[4]).write_text("half")
    print("building", flush=True)
    time.sleep(60)

EngineCache(Path(sys.argv[1])).open(sys.argv[2], json.loads(sys.argv[3]), make)
"""


@pytest.mark.parametrize("is_kept", [False, True], ids=["while it builds", "while it opens"])
def test_what_a_killed_process_left_is_not_used_and_its_lock_is_free(root: Path, is_kept: bool) -> None:
    if is_kept:
        EngineCache(root).open(KEY, FACTS, Runtime("old").session)
    command = [sys.executable, "-c", KILLED, str(root), KEY, json.dumps(FACTS), ENGINE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "building\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert kept(root) == ([KEY] if is_kept else [f"{KEY}.building-{process.pid}"])
    runtime = Runtime("new")
    assert EngineCache(root).open(KEY, FACTS, runtime.session) == "engine of new"
    assert runtime.found == [[]]
    assert kept(root) == [KEY]


def test_many_that_ask_for_one_engine_build_it_once(root: Path) -> None:
    runtime = Runtime()

    def slowly(folder: Path) -> str:
        time.sleep(0.02)
        return runtime.session(folder)

    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(lambda _: EngineCache(root).open(KEY, FACTS, slowly), range(8)))
    assert sessions == ["engine of weights"] * 8
    assert runtime.found.count([]) == 1
    assert kept(root) == [KEY]


def test_an_engine_does_not_wait_for_another(root: Path) -> None:
    other = engine_facts(**{**SAME, "precision": "fp32"})

    def open_another(folder: Path) -> str:
        return EngineCache(root).open(engine_key(other), other, Runtime("other").session)

    assert EngineCache(root).open(KEY, FACTS, open_another) == "engine of other"


def test_all_that_is_kept_is_private(root: Path) -> None:
    modes: list[int] = []

    def make(folder: Path) -> str:
        modes.append(folder.stat().st_mode & 0o777)
        return Runtime().session(folder)

    before = os.umask(0)
    try:
        EngineCache(root).open(KEY, FACTS, make)
    finally:
        os.umask(before)
    assert modes == [0o700]
    assert {path.name: path.stat().st_mode & 0o777 for path in (root, *root.iterdir())} == {
        root.name: 0o700,
        KEY: 0o700,
        f"{KEY}.lock": 0o600,
    }


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720])
def test_a_store_that_others_can_write_is_refused(root: Path, folder: Path, mode: int) -> None:
    root.chmod(mode)
    with pytest.raises(DeviceUnavailable, match=f"mode {mode:o}.* 'chmod 700 {root}' .*CAPPY_CACHE"):
        EngineCache(root).open(KEY, FACTS, Runtime().session)
    root.chmod(0o700)
    assert EngineCache(root).open(KEY, FACTS, Runtime("new").session) == "engine of weights"


def test_a_store_of_someone_else_is_refused(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    someone = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: someone + 1)
    with pytest.raises(DeviceUnavailable, match=f"{root} belongs to user {someone}.* set CAPPY_CACHE"):
        EngineCache(root).open(KEY, FACTS, Runtime().session)


@pytest.mark.parametrize("place", [lambda path: path.touch(), lambda path: path.symlink_to(path.parent)])
def test_a_store_that_is_no_folder_is_refused(tmp_path: Path, place: Callable[[Path], object]) -> None:
    place(tmp_path / "engines")
    with pytest.raises(DeviceUnavailable, match="engines is not a folder; remove it, or set CAPPY_CACHE"):
        EngineCache(tmp_path / "engines").open(KEY, FACTS, Runtime().session)


def test_a_store_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DeviceUnavailable, match=r"engines cannot be kept in .*set CAPPY_CACHE"):
        EngineCache(tmp_path / "file" / "engines").open(KEY, FACTS, Runtime().session)


@pytest.mark.parametrize("name", ["trt_engine_cache_path", "trt_timing_cache_path", "device_id"])
def test_the_key_does_not_depend_on_where_engines_are_kept(name: str) -> None:
    moved = {**SAME, "options": {**OPTIONS, name: "/there"}}
    assert engine_key(engine_facts(**moved)) == KEY
    without = {**SAME, "options": {option: value for option, value in OPTIONS.items() if option != name}}
    assert engine_key(engine_facts(**without)) == KEY


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_sha256", ["ef" * 32, "cd" * 32]),
        ("model_sha256", ["ab" * 32]),
        ("precision", "fp32"),
        ("profile_text", "input_ids:1x32"),
        ("options", {**OPTIONS, "trt_fp16_enable": "False"}),
        ("options", {**OPTIONS, "trt_builder_optimization_level": "5"}),
        *[("gpu", {**GPU, fact: "another"}) for fact in GPU],
        *[("versions", {**VERSIONS, fact: "another"}) for fact in VERSIONS],
    ],
)
def test_the_key_depends_on_all_else(name: str, value: object) -> None:
    assert engine_key(engine_facts(**{**SAME, name: value})) != KEY


def test_a_key_is_a_name_and_does_not_depend_on_the_order_of_facts() -> None:
    assert len(KEY) == 32
    assert set(KEY) <= set("0123456789abcdef")
    assert engine_key(dict(reversed(FACTS.items()))) == KEY


def test_engines_are_kept_where_the_environment_says() -> None:
    assert engine_folder({"HOME": "/h"}) == Path("/h/.cache/cappy-engine/engines")
    assert engine_folder({"HOME": "/h", "XDG_CACHE_HOME": "/x"}) == Path("/x/cappy-engine/engines")
    assert engine_folder({"HOME": "/h", "XDG_CACHE_HOME": "/x", "CAPPY_CACHE": "/c"}) == Path("/c/engines")
