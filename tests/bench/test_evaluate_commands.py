"""`cappy evaluate` as people run it: tables, JSON, plots, and what is refused before anything is scored."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.bundle import PRECISIONS
from cappy_engine.cli.main import main
from cappy_export import ExportOptions, export
from cappy_export.adaptation.samples import read_samples
from tests.support.absent import EXPORTER, run_without
from tests.support.protocol_rows import GOOD, choice, lines_of, samples, write


@pytest.fixture
def some_file(tmp_path: Path) -> Path:
    words = ["Yes", "No", "It depends on the weather", "maybe"]
    rows = [
        choice("RTE" if place < 40 else "CB", place // 4, int(place % 4 == place // 4 % 4), response=words[place % 4])
        for place in range(80)
    ]
    return write(tmp_path, rows, "some.jsonl") / "some.jsonl"


def test_the_command_compares_precisions_with_pytorch(
    some_file: Path, bundle: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--bundle", str(bundle), "--against", str(checkpoint)]
    assert main([*command, "--precision", "fp32", "--precision", "int8"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["dataset", "examples", "chance", "PyTorch", "fp32", "int8"]
    assert [line.split()[:3] for line in shown.splitlines()[1:4]] == [
        ["RTE", "10", "25.0"],
        ["CB", "10", "25.0"],
        ["mean", "20", "25.0"],
    ]
    assert "fp32 against PyTorch: the same decision in 20 of 20 examples (100.00%)" in shown
    assert "int8 against PyTorch: the same decision in" in shown


def test_the_command_gives_the_same_as_json(some_file: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--bundle", str(bundle), "--json", "--examples", "3"]
    assert main([*command, "--precision", "fp32", "--precision", "fp16"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["averages"]["fp32"]["mean"]["count"] == 6
    assert document["agreement"]["fp16 against fp32"]["examples"] == 6


@pytest.mark.slow
def test_pytorch_cuts_pairs_where_the_bundle_does(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint, tmp_path / "short", ExportOptions(max_length=24))
    words = "the sky is blue or green and nobody knows why it was so long ago".split()
    rows = [
        {
            **choice("RTE", place // 4, int(place % 4 == 0)),
            "instruction": " ".join(words[place // 4 % 13 :] * 4),
            "response": " ".join(words[place % 13 :] * 3) + words[place % 7],
        }
        for place in range(80)
    ]
    write(tmp_path, rows, "long.jsonl")
    command = ["evaluate", "promptsource", str(tmp_path / "long.jsonl"), "--bundle", str(tmp_path / "short")]
    assert main([*command, "--against", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["fp32 against PyTorch"]["share"] == 1


def test_examples_that_say_nothing_are_counted_below_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [choice("RTE", place // 2, int(place == 0), response=f"r {place}") for place in range(6)]
    rows += [choice("RTE", 3, 1, response="a"), choice("RTE", 3, 1, response="b"), choice("RTE", 4, 1)]
    write(tmp_path, rows, "some.jsonl")
    assert main(["evaluate", "promptsource", str(tmp_path / "some.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "2 of 5 examples have no right candidate: they count as wrong",
        "2 of 5 examples have only right candidates: they count as right",
    ]


def test_a_precision_that_the_bundle_lacks_is_found_before_anything_is_scored(
    some_file: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--against", str(checkpoint)]
    assert main([*command, "--precision", "int8", "--precision", "fp32"]) == 1
    err = capsys.readouterr().err
    assert "has no fp32 model for cpu, only int8" in err
    assert "threads" not in err
    assert "scoring" not in err


def test_auto_is_a_precision_too_and_none_is_scored_twice(
    some_file: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "promptsource", str(some_file), "--bundle", str(bundle), "--json"]
    for asked, chosen in ((["auto"], ["fp32"]), (["auto", "int8", "fp32"], ["fp32", "int8"])):
        assert main([*command, *(word for name in asked for word in ("--precision", name))]) == 0
        shown = capsys.readouterr()
        assert [name for name in json.loads(shown.out)["averages"] if name in (*PRECISIONS, "auto")] == chosen
        assert [name for name in PRECISIONS for _ in range(shown.err.count(f"{name} on cpu"))] == chosen


@pytest.mark.parametrize("protocol", ["promptsource", "bigbench"])
def test_a_revision_of_no_checkpoint_is_wrong_usage(
    protocol: str, some_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", protocol, str(some_file), "--revision", "main"]) == 2
    assert "--revision is the CHECKPOINT's of --against, which is not given" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", [["evaluate", "--verbose", "promptsource"], ["evaluate", "promptsource", "--verbose"]], ids=" ".join
)
def test_verbose_may_stand_before_and_after_the_protocol(
    before: list[str], some_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*before, str(some_file)]) == 0
    assert "batches of up to" in capsys.readouterr().err
    assert main(["evaluate", "promptsource", str(some_file)]) == 0
    assert "batches of up to" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_line_that_is_refused_is_named_with_its_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    content = b"".join(lines_of([choice("RTE", 0, 1), choice("RTE", 0, "no")]))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert main(["evaluate", "promptsource", str(path)]) == 1
    assert capsys.readouterr().err == f"cappy evaluate: {path}, line 2: label must be 0 or 1, got 'no'\n"


def test_a_line_of_stdin_that_is_refused_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}\n")))
    assert main(["evaluate", "promptsource", "-"]) == 1
    assert "cappy evaluate: stdin, line 1: has no field 'dataset_name'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("protocol", "row", "name"),
    [
        ("promptsource", choice("RTE", 0, 0, response="x" * 1_000_001), "response"),
        ("promptsource", {**choice("RTE", 0, 0), "instruction": "x" * 1_000_001}, "instruction"),
        ("bigbench", {**GOOD, "instruction": "x" * 1_000_001}, "instruction"),
        ("bigbench", {**GOOD, "samples": ["a", "b", "x" * 1_000_001, ""]}, "an entry of 'samples'"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_text_that_is_too_long_to_score_is_named_with_its_file_and_line(
    protocol: str, row: dict[str, Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = choice("RTE", 1, 1) if protocol == "promptsource" else GOOD
    path = write(tmp_path, [first, row], "some.jsonl") / "some.jsonl"
    assert main(["evaluate", protocol, str(path)]) == 1
    problem = f"{path}, line 2: {name} has 1000001 characters, and at most 1000000 are scored; shorten it"
    assert capsys.readouterr().err == f"cappy evaluate: {problem}\n"


def test_an_empty_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert main(["evaluate", "promptsource", str(tmp_path / "empty.jsonl")]) == 1
    assert "holds no examples" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks of ten examples."""
    words = ["the dogs", "the dogs were running", "cats", "42"]
    rows = [
        samples(task, words[place % 4 :] + words[: place % 4], [words[place % 3]], [-1.0, -2.0, -0.5, -3.0])
        for task in ("alpha", "beta")
        for place in range(10)
    ]
    return write(tmp_path / "samples", rows)


def test_the_command_shows_every_way_and_compares_precisions_with_pytorch(
    folder: Path, bundle: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "bigbench", str(folder), "--bundle", str(bundle), "--against", str(checkpoint)]
    assert main([*command, "--precision", "fp32", "--precision", "int8"]) == 0
    shown = capsys.readouterr().out.splitlines()
    ways = ["beam", "sampling", "top-k", "self sum", "self mean", "random", "PyTorch", "fp32", "int8", "oracle"]
    assert shown[2].split() == ["task", "examples", *" ".join(ways).split()]
    assert [line.split()[:2] for line in shown[3:6]] == [["alpha", "10"], ["beta", "10"], ["mean", "20"]]
    assert [line[: len("mean over tasks")].strip() for line in shown[8:18]] == ways
    assert "fp32 against PyTorch: the same decision in 20 of 20 examples (100.00%)" in "\n".join(shown)


@pytest.mark.slow
def test_the_command_draws_and_prints_json(
    folder: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "rouge.svg"
    command = ["evaluate", "bigbench", str(folder), "--bundle", str(bundle), "--examples", "3", "--json"]
    assert main([*command, "--plot", str(plot)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["averages"]["fp32"]["mean"]["count"] == 6
    drawn = plot.read_text()
    for text in ("self mean", "oracle", "alpha", f"{100 * document['averages']['fp32']['mean']['mean']:.1f}"):
        assert f">{text}<" in drawn
    assert main([*command, "--plot", str(plot)]) == 1
    assert "rouge.svg exists; choose another name, or replace it with --force" in capsys.readouterr().err
    assert main([*command, "--plot", str(plot), "--force"]) == 0
    assert plot.read_text() == drawn


@pytest.mark.slow
def test_the_command_needs_neither_pytorch_nor_transformers(folder: Path) -> None:
    command = ["evaluate", "bigbench", str(folder), "--plot", "rouge.svg", "--examples", "2"]
    done = run_without([*EXPORTER, "openai"], *command, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "mean over tasks" in done.stdout
    assert (folder.parent / "rouge.svg").is_file()


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "bigbench", str(folder), "--plot", str(tmp_path / "a.jpeg")]) == 1
    err = capsys.readouterr().err
    assert "a.jpeg must end in" in err
    assert "threads" not in err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["evaluate", "bigbench", "FOLDER"], "--force replaces FILE; name it with --plot"),
        (["render", "promptsource"], "--force replaces OUT; name it with -o"),
        (["bench", "bulk"], "--force replaces RESULT.json; name it with --out"),
    ],
    ids=["evaluate", "render", "bench"],
)
def test_replacing_what_has_no_name_is_wrong_usage(
    command: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder) if word == "FOLDER" else word for word in command] + ["--force"]) == 2
    assert told in capsys.readouterr().err


def test_figures_that_cannot_be_drawn_are_an_error_after_they_were_printed(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "tasks", [{**GOOD, "dataset": "a lone surrogate \ud800"}])
    command = ["evaluate", "bigbench", str(folder), "--bundle", str(bundle), "--plot", str(tmp_path / "a.svg")]
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "mean over tasks" in shown.out
    assert f"the plot {tmp_path / 'a.svg'} cannot be drawn" in shown.err


def test_what_is_evaluated_can_be_adapted_to(folder: Path) -> None:
    assert len(read_samples(folder / "tasks.jsonl")) == 20
