"""What launchers put into the environment: enough to join the others, or an error that says what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cappy_engine.cli.main import main
from cappy_engine.errors import AdaptError
from cappy_export.adaptation.launch import check_launch, join
from cappy_export.adaptation.training import adapt
from tests.support.colours import RECIPE, colour_examples
from tests.support.places import ROOT

WHOLE = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "found",
    [
        {},
        WHOLE,
        {"LOCAL_RANK": "-1"},
        {"LOCAL_RANK": ""},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
    ],
)
def test_one_process_alone_and_a_whole_launch_are_taken(found: dict[str, str]) -> None:
    check_launch(found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"LOCAL_RANK": "0"}, "but RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not; start with accelerate launch"),
        ({**WHOLE, "MASTER_PORT": ""}, "but MASTER_PORT is not; .* or unset LOCAL_RANK"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but LOCAL_RANK is not set: each process would train alone"),
        ({**WHOLE, "LOCAL_RANK": "-1"}, "WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS is 2, but LOCAL_RANK is not set: each process would",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "accelerate launch --cpu was asked for several processes, and starts one; leave out --cpu",
        ),
        ({**WHOLE, "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({**WHOLE, "RANK": "-1"}, "RANK is -1 and WORLD_SIZE 2"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK in the environment must be a whole number, found 'first'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE in the environment must be a whole number"),
    ],
)
def test_a_part_of_a_launch_is_an_error_that_says_what_is_missing(found: dict[str, str], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        check_launch(found)


def test_other_processes_than_the_launchers_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    train = ROOT / "docs" / "examples" / "train.jsonl"
    assert main(["adapt", str(checkpoint), str(train), str(tmp_path / "out"), "--processes", "4"]) == 1
    assert "--processes is 4, but a launcher started 2 processes; leave it out" in capsys.readouterr().err


def test_adapt_says_what_is_missing_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    train = ROOT / "docs" / "examples" / "train.jsonl"
    assert main(["adapt", str(checkpoint), str(train), str(tmp_path / "out")]) == 1
    assert "cappy adapt: LOCAL_RANK is set" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_another_precision_than_a_training_before_it_had_needs_a_new_process(checkpoint: Path, tmp_path: Path) -> None:
    before = join("auto", wait_seconds=600).mixed_precision
    other = "bf16" if before == "no" else "no"
    with pytest.raises(AdaptError, match=f"mixed precision {before} .*; start a new process for {other}"):
        adapt(checkpoint, colour_examples(20), tmp_path / "out", dataclasses.replace(RECIPE, mixed_precision=other))
    assert list(tmp_path.iterdir()) == []
