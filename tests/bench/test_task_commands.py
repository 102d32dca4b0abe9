"""`cappy sample` and `cappy render` as people use them, and that what they write is what the next command takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.cli.main import main
from cappy_export.adaptation.samples import read_samples
from tests.support.small_endpoint import answered, serving
from tests.support.small_llms import make_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("llm") / "t5", "t5")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"dataset": "colours", "example_idx": place, "instruction": f"{place}: which colour?", "references": ["blue"]}
        for place in range(5)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_candidates_are_sampled_by_the_papers_decodings_and_can_be_evaluated_and_adapted_to(
    llm: Path, prompts: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "samples" / "colours.jsonl"
    out.parent.mkdir()
    assert main(["sample", str(prompts), "--llm", str(llm), "-o", str(out), "--max-new-tokens", "6"]) == 0
    assert "85 samples of 5 instructions" in capsys.readouterr().err
    rows = rows_in(out)
    assert [row["example_idx"] for row in rows] == list(range(5))
    ways = ["beam", *(name for name in ("sampling", "temperature", "top-k", "top-p") for _ in range(4))]
    assert all(row["decodings"] == ways for row in rows)
    assert len(read_samples(out)) == 5
    assert main(["evaluate", "bigbench", str(out.parent), "--bundle", str(bundle)]) == 0
    header = capsys.readouterr().out.splitlines()[2]
    assert header.split()[2:9] == ["beam", "sampling", "temperature", "top-k", "top-p", "self", "sum"]


def test_sampling_is_repeatable_and_never_overwrites(
    llm: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "sample",
        str(prompts),
        "--llm",
        str(llm),
        "--max-new-tokens",
        "4",
        "--decoding",
        "top-p",
        "--count",
        "2",
    ]
    for name in ("a", "b"):
        assert main([*command, "-o", str(tmp_path / f"{name}.jsonl")]) == 0
    assert rows_in(tmp_path / "a.jsonl") == rows_in(tmp_path / "b.jsonl")
    assert {len(row["samples"]) for row in rows_in(tmp_path / "a.jsonl")} == {2}
    assert main([*command, "-o", str(tmp_path / "other.jsonl"), "--seed", "1"]) == 0
    assert rows_in(tmp_path / "other.jsonl") != rows_in(tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    assert main([*command, "-o", str(tmp_path / "a.jsonl")]) == 1
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert f"{tmp_path / 'a.jsonl'} exists" in capsys.readouterr().err


def test_samples_that_a_content_filter_stopped_are_not_told_as_too_long(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        server.answer = lambda body: answered(body, finish_reason="content_filter")
        options = ["--endpoint", server.url, "--model", "m", "--decoding", "greedy"]
        assert main(["sample", str(prompts), *options, "-o", str(tmp_path / "samples.jsonl")]) == 0
    assert "5 samples were cut at --max-new-tokens or by a content filter\n" in capsys.readouterr().err


@pytest.mark.slow
def test_candidates_come_from_an_endpoint(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    out = tmp_path / "samples.jsonl"
    with serving() as server:
        assert (
            main(["sample", str(prompts), "--endpoint", server.url, "--model", "m", "-o", str(out), "--count", "2"])
            == 0
        )
    assert {body["model"] for body in server.bodies} == {"m"}
    assert [row["decodings"] for row in rows_in(out)] == [["sampling"] * 2 + ["temperature"] * 2 + ["top-p"] * 2] * 5
    assert rows_in(out)[3]["samples"][0] == "3: which colour? 0"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--llm", "x", "--model", "m"], "--model goes with --endpoint"),
        (["--llm", "x", "--no-log-likelihoods"], "--no-log-likelihoods goes with --endpoint"),
        (["--endpoint", "http://localhost/v1", "--model", "m", "--dtype", "float32"], "--dtype goes with --llm"),
        (["--endpoint", "http://localhost/v1"], "--endpoint needs --model"),
        (["--endpoint", "http://localhost/v1", "--model", "m", "--extra-body", "[1]"], "must be a JSON object"),
        (["--endpoint", "http://localhost/v1", "--model", "m", "--extra-body", "{"], "must be JSON, got '{'"),
        (["--llm", "x", "--max-completion-tokens"], "--max-completion-tokens goes with --endpoint"),
        (["--endpoint", "http://localhost/v1", "--llm", "x"], "give one of --llm and --endpoint"),
        ([], "give one of --llm and --endpoint"),
        (["--llm", "x", "--seed", "-1"], "-1 is not in the range x>=0"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    options: list[str], problem: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(prompts), "-o", "out.jsonl", *options]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["--decoding", "nucleus"], "unknown decoding 'nucleus'; choose from beam, sampling"),
        (["-o", "x.jsonl.gz"], "choose a name that ends in .jsonl, not x.jsonl.gz"),
        (["--resume"], "there is nothing to resume"),
        ([], "prompts.jsonl, line 6: not JSON"),
    ],
)
def test_what_can_be_known_at_once_is_refused_before_an_llm_is_opened(
    changes: list[str], problem: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no such LLM, which would be the error if it was looked for."""
    prompts.write_text(prompts.read_text() + "{\n")
    command = ["sample", str(prompts), "--llm", str(tmp_path / "none"), "-o", str(tmp_path / "out.jsonl"), *changes]
    assert main(command) == 1
    assert problem in capsys.readouterr().err


def test_rendering_says_how_to_install_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("promptsource"):
        pytest.skip("promptsource is installed")
    assert main(["render", "promptsource", "--task", "RTE", "-o", str(tmp_path / "tasks.jsonl")]) == 1
    assert "pip install --no-deps --ignore-requires-python promptsource" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "status"), [("RTE", 2), ("=x.csv", 2), ("Nonesuch=x.csv", 1)])
def test_a_file_of_examples_is_named_with_its_task(text: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", "promptsource", "--file", text]) == status
    assert ("must be NAME=PATH" if status == 2 else "there is no task 'Nonesuch'") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--task", "RTE", "--file", "CB=cb.csv"], "--file names CB, which is not among --task RTE"),
        (["--file", "RTE=a.csv", "--file", "CB=cb.csv", "--file", "RTE=b.csv"], "--file names RTE 2 times"),
    ],
)
def test_a_file_that_would_not_be_read_is_wrong_usage(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["render", "promptsource", *options]) == 2
    assert problem in capsys.readouterr().err
