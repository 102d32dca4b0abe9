"""Mode and batch size: what is asked for, then what was measured here, then by the model's size."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.cpu.execution import BATCH_TOKENS, MODES, SMALL_MODEL_BYTES, Execution, choose_execution
from cappy_engine.cpu.tuned import read_tuned, tuned_key, write_tuned
from cappy_engine.storage import cache_folder

TUNED = Execution("both", 1024, "measured")
FACTS = {"cpu": "some processor", "threads": 2, "onnxruntime": "1.32.0", "model": ["ab" * 32]}


def chosen(mode: str = "auto", *, budget: int | None = None, tuned: Execution | None = None, **facts: int) -> Execution:
    threads, size = facts.get("threads", 4), facts.get("model_bytes", SMALL_MODEL_BYTES + 1)
    return choose_execution(mode, threads=threads, model_bytes=size, tuned=tuned, max_batch_tokens=budget)


def test_a_large_model_is_held_once_and_a_small_one_twice() -> None:
    assert chosen().mode == "latency"
    assert chosen(model_bytes=SMALL_MODEL_BYTES).mode == "both"


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_is_asked_for_is_what_runs(mode: str) -> None:
    assert chosen(mode, tuned=TUNED) == Execution(mode, TUNED.max_batch_tokens, "asked for")


def test_what_was_measured_comes_before_what_is_assumed() -> None:
    assert chosen(tuned=TUNED) == Execution("both", 1024, "measured by cappy tune")


def test_a_batch_size_that_is_asked_for_comes_first() -> None:
    assert chosen(budget=7, tuned=TUNED).max_batch_tokens == 7
    assert chosen(budget=7).max_batch_tokens == 7
    assert chosen().max_batch_tokens == BATCH_TOKENS


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_with_one_thread_there_is_one_session(mode: str) -> None:
    assert chosen(mode, threads=1, tuned=TUNED).mode == "latency"


@settings(deadline=None)
@given(mode=st.sampled_from(MODES), budget=st.integers(1, 10**6), reason=st.text(max_size=20))
def test_an_answer_comes_back_as_it_was_kept(
    tmp_path_factory: pytest.TempPathFactory, mode: str, budget: int, reason: str
) -> None:
    folder = tmp_path_factory.mktemp("tuned") / "not" / "there" / "yet"
    path = write_tuned(folder, "key", Execution(mode, budget, reason), FACTS)
    assert read_tuned(folder, "key") == Execution(mode, budget, reason)
    assert read_tuned(folder, "another") is None
    assert json.loads(path.read_text())["facts"] == FACTS
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"mode": "fastest", "max_batch_tokens": 512, "reason": ""}',
     b'{"mode": "both", "max_batch_tokens": 0, "reason": ""}', b'{"mode": [], "max_batch_tokens": 1, "reason": ""}',
     b"\xff"],
)  # fmt: skip
def test_an_answer_that_cannot_be_read_is_left_out_aloud(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "key.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_tuned(tmp_path, "key") is None
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"the answer of cappy tune in {tmp_path / 'key.json'} cannot be read (")
    assert message.endswith("; measure again with cappy tune, or remove it with cappy tune --clear")


@pytest.mark.parametrize(("mode", "said"), [(0o755, ["inner/key.json cannot be read (Permission denied)"]), (0, [])])
def test_an_answer_without_permission_is_left_out_aloud_but_in_a_closed_folder_is_none(
    mode: int, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be entered, as root's is for the user of a container, may hold no answer at all."""
    path = write_tuned(tmp_path / "inner", "key", TUNED, FACTS)
    path.chmod(0)
    path.parent.chmod(mode)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # from here on no folder above is asked
    user = os.geteuid()
    try:
        if user == 0:  # who may read all
            os.seteuid(65534)
        assert read_tuned(Path("inner"), "key") is None
    finally:
        os.seteuid(user)
        path.parent.chmod(0o755)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(", so")[0].removeprefix("the answer of cappy tune in ") for message in messages] == said


@pytest.mark.parametrize("name", FACTS)
def test_an_answer_is_for_one_processor_thread_count_runtime_and_model(name: str) -> None:
    assert tuned_key(FACTS) == tuned_key(dict(reversed(FACTS.items())))
    assert tuned_key({**FACTS, name: "other"}) != tuned_key(FACTS)


def test_answers_are_kept_where_the_environment_says() -> None:
    assert cache_folder({"HOME": "/h"}) == Path("/h/.cache/cappy-engine")
    assert cache_folder({"HOME": "/h", "XDG_CACHE_HOME": "/x"}) == Path("/x/cappy-engine")
    assert cache_folder({"HOME": "/h", "XDG_CACHE_HOME": "/x", "CAPPY_CACHE": "/c"}) == Path("/c")


def test_nothing_need_be_writable_to_read_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    assert read_tuned(cache_folder({}), "0" * 64) is None
