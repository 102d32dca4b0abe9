"""A GPU check that was stopped goes on, and mixes nothing that cannot be compared."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy_bench.gpu.check import NOT_ASKED
from tests.support.gpu_checks import NO_GPU, Ran

pytestmark = pytest.mark.slow

NO_FIGURES = '{"settings": {}, "machine": {}, "steps": [{"name": "parity/cuda/fp16", "status": "ok", "figures": null}]}'


def test_a_check_goes_on_with_what_went_well(gpu_check: Callable[..., Ran]) -> None:
    first = gpu_check(only=["drill"])
    assert first.step("open/cuda/fp16")["reason"] == NOT_ASKED
    second = gpu_check("--resume", only=["open"], crashes_at="open/tensorrt/fp16/again")
    assert second.step("drill/hidden-gpu") == first.step("drill/hidden-gpu")
    assert second.step("open/tensorrt/fp16/first")["status"] == "ok"
    assert "drill/hidden-gpu" in second.document["settings"]["kept"]
    third = gpu_check("--resume", only=["open"])
    assert third.status == 0, third.printed
    assert third.step("open/tensorrt/fp16/first") == second.step("open/tensorrt/fp16/first")


def test_a_check_goes_on_where_its_engines_were_removed(gpu_check: Callable[..., Ran], tmp_path: Path) -> None:
    gpu_check(only=["open"], crashes_at="open/tensorrt/fp16/again")
    shutil.rmtree(tmp_path / "work" / "cache")
    ran = gpu_check("--resume", only=["open"])
    assert ran.status == 0, ran.printed
    assert ran.step("open/tensorrt/fp16/first")["figures"]["engines_built"] == 4


def test_what_is_kept_is_not_lost_where_a_check_is_stopped(
    gpu_check: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gpu_check(only=["profile"])

    def stop(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("cappy_bench.gpu.check._in_child", stop)
    with pytest.raises(KeyboardInterrupt):
        gpu_check("--resume", only=["parity"])
    left = json.loads((tmp_path / "result.json").read_text())
    assert first.step("profile/cuda-fp16") in left["steps"]


@pytest.mark.parametrize("name", ["model", "versions"])
def test_what_cannot_be_compared_is_not_gone_on_with(gpu_check: Callable[..., Ran], tmp_path: Path, name: str) -> None:
    first = gpu_check(installation=NO_GPU)
    (tmp_path / "result.json").write_text(json.dumps({**first.document, name: {}}))
    with pytest.raises(SystemExit, match=f"differs in its {name}"):
        gpu_check("--resume", installation=NO_GPU)


def test_a_kept_parity_that_is_not_finite_is_not_gone_on_with(gpu_check: Callable[..., Ran], tmp_path: Path) -> None:
    """It could not be written again."""
    first = gpu_check(installation=NO_GPU).document
    steps = [{"name": "parity/cuda/fp16", "status": "ok", "figures": {"max_error": 0.0, "spearman": float("nan")}}]
    (tmp_path / "result.json").write_text(json.dumps({**first, "steps": steps}))
    with pytest.raises(SystemExit, match=r"result\.json, parity/cuda/fp16: the parity's spearman is nan.* --force"):
        gpu_check("--resume", installation=NO_GPU)


@pytest.mark.parametrize(("option", "before"), [("--data", True), ("--questions", False)])
def test_real_texts_and_made_up_ones_do_not_stand_in_one_result(
    gpu_check: Callable[..., Ran], tmp_path: Path, option: str, before: bool
) -> None:
    pairs = tmp_path / "promptsource_test.jsonl.gz"
    pairs.write_bytes(gzip.compress(b'{"instruction": "Is the sky blue?", "response": "Yes"}\n'))
    texts = (option, str(pairs if option == "--questions" else tmp_path))
    gpu_check(*(texts if before else ()), installation=NO_GPU)
    with pytest.raises(SystemExit, match="differs in its texts"):
        gpu_check("--resume", *(() if before else texts), installation=NO_GPU)


def test_questions_that_are_not_there_are_an_error(gpu_check: Callable[..., Ran], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*No such file.*nowhere\.jsonl"):
        gpu_check("--questions", str(tmp_path / "nowhere.jsonl"), installation=NO_GPU)


@pytest.mark.parametrize("text", ["", "[]", '{"steps": 3}', NO_FIGURES])
def test_a_file_of_something_else_is_not_gone_on_with(gpu_check: Callable[..., Ran], tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(SystemExit, match="is not a result of a GPU check"):
        gpu_check("--resume", only=["open"])
