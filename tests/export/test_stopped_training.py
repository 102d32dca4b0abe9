"""A training that was stopped: it goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from cappy_engine.errors import AdaptError, OutputError
from cappy_export.adaptation.examples import make_examples
from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.recipe import AdaptOptions
from cappy_export.adaptation.training import adapt
from tests.support.checkpoints import copy
from tests.support.colours import (
    RECIPE,
    StoppedError,
    colour_examples,
    same_weights,
    weights_of,
    write_examples,
)


def stop_at_the_second(progress: Progress) -> None:
    if progress.step == 2:
        raise StoppedError


@pytest.mark.slow
def test_a_training_that_stopped_goes_on_to_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=3, dropout=0.1, window=32)
    examples = colour_examples(75)  # the state is saved in the middle of them

    def stop(progress: Any) -> None:
        if progress.step == 11:
            raise StoppedError

    def run(name: str, *, resume: bool = False, **options: Any) -> dict[str, Any]:
        every = AdaptOptions(save_every=4, evaluate_every=3, resume=resume)
        return adapt(checkpoint, examples, tmp_path / name, recipe, every, **options)

    whole = run("whole")
    with pytest.raises(StoppedError):
        run("parts", progress=stop)
    assert not (tmp_path / "parts").exists()
    folder = tmp_path / "parts.training"
    assert [path.name for path in folder.glob("step-*")] == ["step-8"]  # and not that of step 4
    (folder / "step-8" / "meter.json").unlink()  # older versions saved none
    shutil.copytree(folder / "step-8", folder / "step-4")  # as a kill between the new state and the old one leaves it
    resumed = run("parts", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    for log in (whole["log"], resumed["log"]):
        for entry in log:
            entry.pop("seconds", None)
    assert [entry["step"] for entry in resumed["log"]] == [entry["step"] for entry in whole["log"]]
    assert resumed["log"][-1]["held_out_loss"] == whole["log"][-1]["held_out_loss"]


@pytest.mark.slow
def test_killed_with_sigkill_and_resumed_the_command_ends_with_the_same_weights(
    checkpoint: Path, preloaded: Path, tmp_path: Path
) -> None:
    train = write_examples(tmp_path / "train.jsonl", colour_examples(200))
    options = ["--batch-size", "16", "--epochs", "4", "--learning-rate", "1e-3", "--save-every", "5"]

    def command(out: str, *more: str) -> list[str]:
        return [str(preloaded / "cappy"), "adapt", str(checkpoint), str(train), str(tmp_path / out), *options, *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    killed = subprocess.Popen(command("parts"), stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts.training").glob("step-1?")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()  # until it has ended, and with it the program that it stands for
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run(command("parts", "--resume"), check=True, capture_output=True, env=environment, text=True)
    assert "going on after step" in done.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_every", "kind", "told"),
    [
        (2, KeyboardInterrupt, "the state of step 4 is kept in {}; go on with --resume"),
        (50, SystemExit, "no state was saved yet; {} can be removed, or the training starts again with --resume"),
    ],
)
def test_a_training_that_a_signal_stops_says_how_to_go_on(
    checkpoint: Path, tmp_path: Path, save_every: int, kind: type[BaseException], told: str
) -> None:
    said: list[str] = []

    def stop(progress: Any) -> None:
        if progress.step == 5:
            raise kind

    options = AdaptOptions(save_every=save_every)
    with pytest.raises(kind):
        adapt(checkpoint, colour_examples(60), tmp_path / "out", RECIPE, options, say=said.append, progress=stop)
    assert said[-1] == told.format(tmp_path / "out.training")


def test_a_training_over_a_result_that_was_stopped_says_how_to_go_on_and_what_force_would_remove(
    checkpoint: Path, tmp_path: Path
) -> None:
    examples, out = colour_examples(20), tmp_path / "out"
    recipe, options = dataclasses.replace(RECIPE, max_steps=3), AdaptOptions(save_every=1)
    adapt(checkpoint, examples, out, dataclasses.replace(recipe, max_steps=1))
    said: list[str] = []

    def stop(progress: Progress) -> None:
        if progress.step == 2 and "going on after step 1" not in said:
            raise KeyboardInterrupt

    def run(**changes: bool) -> None:
        every = dataclasses.replace(options, **changes)  # type: ignore[arg-type]
        adapt(checkpoint, examples, out, recipe, every, say=said.append, progress=stop)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(force=True)
        assert said[-1] == f"the state of step 1 is kept in {out}.training; go on with --resume --force"
    assert said.count(f"note: --force starts anew: the state of step 1 in {out}.training is removed") == 1
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"exists beside .* --resume --force \(--force alone starts anew\)"):
            run(resume=resume)
    assert (tmp_path / "out.training" / "step-1").is_dir()
    run(resume=True, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "training.json").read_text())["recipe"]["max_steps"] == 3


def test_a_copy_that_a_user_made_of_a_state_is_no_state(checkpoint: Path, tmp_path: Path) -> None:
    recipe, options = dataclasses.replace(RECIPE, max_steps=4), AdaptOptions(save_every=1)

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            shutil.copytree(tmp_path / "out.training" / "step-1", tmp_path / "out.training" / "step-1.bak")
            shutil.copytree(tmp_path / "out.training" / "step-1", tmp_path / "out.training" / "step-٣")
        if progress.step == 3:
            assert not (tmp_path / "out.training" / "step-1").exists()
            raise StoppedError

    said: list[str] = []
    with pytest.raises(StoppedError):
        adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, options, progress=stop)
    again = dataclasses.replace(options, resume=True)
    adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, again, say=said.append)
    assert "going on after step 2" in said


def test_another_training_is_not_resumed(checkpoint: Path, tmp_path: Path) -> None:
    examples = colour_examples(20)
    stopped, again = dataclasses.replace(RECIPE, max_steps=3), AdaptOptions(resume=True)
    with pytest.raises(StoppedError):
        adapt(checkpoint, examples, tmp_path / "out", stopped, AdaptOptions(save_every=1), progress=stop_at_the_second)
    with pytest.raises(AdaptError, match="go on with --resume, or replace it with --force"):
        adapt(checkpoint, examples, tmp_path / "out", recipe=stopped)
    with pytest.raises(AdaptError, match=r"another training \(.*recipe\.seed was 0, is 5"):
        adapt(checkpoint, examples, tmp_path / "out", dataclasses.replace(stopped, seed=5), again)
    with pytest.raises(AdaptError, match=r"another training \(.*train\.sha256 was "):
        adapt(checkpoint, colour_examples(21), tmp_path / "out", stopped, again)
    with pytest.raises(AdaptError, match="nothing to resume"):
        adapt(checkpoint, examples, tmp_path / "elsewhere", stopped, again)


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_that_failed_before_its_first_state_is_no_obstacle(
    checkpoint: Path, tmp_path: Path, resume: bool
) -> None:
    examples, out = colour_examples(20), tmp_path / "out"
    wild = dataclasses.replace(RECIPE, max_steps=3, learning_rate=1e30, warmup_fraction=0.0)
    with pytest.raises(AdaptError, match="lower the learning rate"):
        adapt(checkpoint, examples, out, wild)
    assert (tmp_path / "out.training").is_dir()
    adapt(checkpoint, examples, out, dataclasses.replace(wild, learning_rate=1e-3), AdaptOptions(resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [line["step"] for line in map(json.loads, (out / "log.jsonl").open())] == [0, 3]


@pytest.mark.parametrize("kind", ["a link", "another file in it", "settings of something else"])
def test_only_what_a_training_itself_left_is_removed_unasked(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    state, notes = tmp_path / "out.training", tmp_path / "notes"
    notes.mkdir()
    (notes / "settings.json").write_text(
        '{"theme": "dark"}' if kind == "settings of something else" else '{"recipe": {}}'
    )
    if kind == "another file in it":
        (notes / "mine.txt").write_text("mine")
    if kind == "a link":
        state.symlink_to(notes)
    else:
        notes.rename(state)
    with pytest.raises(AdaptError, match="holds a training that was stopped"):
        adapt(checkpoint, colour_examples(20), tmp_path / "out", RECIPE)
    assert (state / "settings.json").exists()


def test_a_training_is_not_resumed_with_other_labels_weights_or_held_out_examples(
    checkpoint: Path, tmp_path: Path
) -> None:
    train, held_out = colour_examples(20), colour_examples(5)
    recipe, again = dataclasses.replace(RECIPE, max_steps=3), AdaptOptions(resume=True)
    with pytest.raises(StoppedError):
        adapt(checkpoint, train, tmp_path / "out", recipe, AdaptOptions(save_every=1), held_out=held_out,
              progress=stop_at_the_second)  # fmt: skip
    other = copy(checkpoint, tmp_path / "same-name" / checkpoint.name)
    weights = weights_of(other)
    weights["classifier.out_proj.bias"] += 1
    save_file(weights, other / "model.safetensors")
    relabelled, remeasured = (make_examples(each.pairs, 1 - each.labels) for each in (train, held_out))
    for source, examples, measured, changed in (
        (checkpoint, relabelled, held_out, "train"),
        (checkpoint, train, remeasured, "held_out"),
        (other, train, held_out, "checkpoint"),
    ):
        with pytest.raises(AdaptError, match=rf"another training \({changed}\.sha256 was "):
            adapt(source, examples, tmp_path / "out", recipe, again, held_out=measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("model.safetensors", None, r"model\.safetensors is missing"),
        ("optimizer.pt", None, r"optimizer\.pt is missing"),
        ("log.jsonl", None, r"log\.jsonl is missing"),
        ("place.json", None, r"place\.json is missing"),
        ("model.safetensors", b"", r"model\.safetensors is damaged"),
        ("optimizer.pt", b"PK\x03\x04 cut", r"optimizer\.pt is damaged"),
        ("optimizer.pt", b"", r"optimizer\.pt is damaged"),
        ("optimizer.pt", b"[1, 2, 3]", r"optimizer\.pt is damaged"),
        ("log.jsonl", b'{"step": 0, "held', r"log\.jsonl is damaged"),
        ("log.jsonl", b"7\n", r"log\.jsonl is damaged"),
        ("meter.json", b"[]", r"meter\.json is damaged"),
        ("place.json", b"{", r"place\.json is damaged"),
        ("place.json", b"[7]", r"place\.json is damaged"),
        ("place.json", b'{"step": "x"}', r"place\.json is damaged"),
    ],
)
def test_a_saved_state_that_is_damaged_is_named(
    file: str, content: bytes | None, problem: str, checkpoint: Path, tmp_path: Path
) -> None:
    recipe, options = dataclasses.replace(RECIPE, max_steps=3), AdaptOptions(save_every=1)
    with pytest.raises(StoppedError):
        adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, options, progress=stop_at_the_second)
    if content is None:
        (tmp_path / "out.training" / "step-1" / file).unlink()
    else:
        (tmp_path / "out.training" / "step-1" / file).write_bytes(content)
    with pytest.raises(AdaptError, match=rf"step-1 cannot be read \({problem}\); .*, and --force starts anew"):
        adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, dataclasses.replace(options, resume=True))
