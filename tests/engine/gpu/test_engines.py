"""What is kept of TensorRT: built once, for one model on one GPU, and found again by all that it depends on."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cappy_engine.gpu.engines import EngineCache, engine_folder, engine_key
from tests.support.engines import ENGINE, FACTS, KEY, Runtime, kept


def test_an_engine_is_built_once_and_then_reused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime()
    with caplog.at_level(logging.WARNING):
        sessions = [EngineCache(root).open(FACTS, runtime.session) for _ in range(3)]
    assert sessions == ["engine of weights"] * 3
    files = ["manifest.json", "model.timing", ENGINE]
    assert runtime.found == [[], files, files]
    assert kept(root) == {KEY}
    assert not caplog.records


def test_what_tensorrt_adds_when_it_opens_an_engine_is_kept_too(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime()

    def add(folder: Path) -> str:
        (folder / "more.timing").write_text("timing")
        (folder / "model.timing").write_text("a longer timing")
        return runtime.session(folder)

    with caplog.at_level(logging.WARNING):
        EngineCache(root).open(FACTS, add)
    assert "TensorRT changed model.timing, more.timing" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        EngineCache(root).open(FACTS, runtime.session)
    assert runtime.found[-1] == ["manifest.json", "model.timing", ENGINE, "more.timing"]
    assert not caplog.records
    assert kept(root) == {KEY}


def fail(folder: Path) -> str:
    (folder / ENGINE).write_text("half")
    raise OSError("out of GPU memory")


def test_a_build_that_raised_leaves_nothing(root: Path) -> None:
    with pytest.raises(OSError, match="out of GPU memory"):
        EngineCache(root).open(FACTS, fail)
    assert kept(root) == set()
    assert EngineCache(root).open(FACTS, Runtime().session) == "engine of weights"


def test_an_engine_that_did_not_open_is_kept_unless_it_was_changed(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> str:
        raise MemoryError

    with pytest.raises(MemoryError):
        EngineCache(root).open(FACTS, refuse)
    assert f"the engine in {folder} is as it was built, but did not open; remove it if this goes on" in caplog.text
    assert EngineCache(root).open(FACTS, Runtime("new").session) == "engine of weights"
    with pytest.raises(OSError, match="out of GPU memory"):
        EngineCache(root).open(FACTS, fail)
    assert EngineCache(root).open(FACTS, Runtime("new").session) == "engine of new"


def test_a_build_that_writes_nothing_is_not_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert EngineCache(root).open(FACTS, lambda folder: "session") == "session"
    assert "TensorRT stored no engine" in caplog.text
    assert kept(root) == set()


KILLED = """
import json, sys, time
from pathlib import Path
from cappy_engine.gpu.engines import EngineCache

def make(folder):
    (folder / sys.argv[3]).write_text("half")
    print("building", flush=True)
    time.sleep(60)

EngineCache(Path(sys.argv[1])).open(json.loads(sys.argv[2]), make)
"""


@pytest.mark.parametrize("is_kept", [False, True], ids=["while it builds", "while it opens"])
def test_what_a_killed_process_left_is_not_used_and_its_lock_is_free(root: Path, is_kept: bool) -> None:
    if is_kept:
        EngineCache(root).open(FACTS, Runtime("old").session)
    command = [sys.executable, "-c", KILLED, str(root), json.dumps(FACTS), ENGINE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "building\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert kept(root) == {KEY if is_kept else f"{KEY}.building-{process.pid}"}
    runtime = Runtime("new")
    assert EngineCache(root).open(FACTS, runtime.session) == "engine of new"
    assert runtime.found == [[]]
    assert kept(root) == {KEY}


def test_many_that_ask_for_one_engine_build_it_once(root: Path) -> None:
    runtime = Runtime()

    def slowly(folder: Path) -> str:
        time.sleep(0.02)
        return runtime.session(folder)

    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(lambda _: EngineCache(root).open(FACTS, slowly), range(8)))
    assert sessions == ["engine of weights"] * 8
    assert runtime.found.count([]) == 1
    assert kept(root) == {KEY}


def test_an_engine_does_not_wait_for_another(root: Path) -> None:
    def open_another(folder: Path) -> str:
        return EngineCache(root).open({**FACTS, "precision": "fp32"}, Runtime("other").session)

    assert EngineCache(root).open(FACTS, open_another) == "engine of other"


@pytest.mark.parametrize("name", FACTS)
def test_the_key_depends_on_every_fact(name: str) -> None:
    assert engine_key({**FACTS, name: "another"}) != KEY
    if isinstance(FACTS[name], dict):
        assert all(engine_key({**FACTS, name: {**FACTS[name], inner: "another"}}) != KEY for inner in FACTS[name])


def test_a_key_is_a_name_and_does_not_depend_on_the_order_of_facts() -> None:
    assert len(KEY) == 32
    assert set(KEY) <= set("0123456789abcdef")
    assert engine_key(dict(reversed(FACTS.items()))) == KEY


def test_engines_are_kept_where_the_environment_says() -> None:
    assert engine_folder({"HOME": "/h"}) == Path("/h/.cache/cappy-engine/engines")
    assert engine_folder({"HOME": "/h", "XDG_CACHE_HOME": "/x"}) == Path("/x/cappy-engine/engines")
    assert engine_folder({"HOME": "/h", "XDG_CACHE_HOME": "/x", "CAPPY_CACHE": "/c"}) == Path("/c/engines")
