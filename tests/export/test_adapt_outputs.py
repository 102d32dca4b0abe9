"""What `cappy adapt` writes: new, or replaced where that is asked for, and never over what it reads."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cappy_engine.errors import AdaptError, CheckpointError, OutputError
from cappy_export.adaptation.log import Progress
from cappy_export.adaptation.recipe import AdaptOptions
from cappy_export.adaptation.training import adapt
from cappy_export.checkpoints.checkpoint import open_checkpoint
from tests.support.checkpoints import copy, edit
from tests.support.colours import RECIPE, StoppedError, colour_examples, same_weights, weights_of, write_examples


def test_what_exists_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for force, problem in (
        (False, "exists; choose another name, or replace it with --force"),
        (True, "has no training"),
    ):
        with pytest.raises(OutputError, match=problem):
            adapt(checkpoint, colour_examples(20), tmp_path / "out", options=AdaptOptions(force=force))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_the_root_of_the_file_system_is_not_replaced(checkpoint: Path) -> None:
    with pytest.raises(OutputError, match=r"^/ exists; choose another name"):
        adapt(checkpoint, colour_examples(20), "/")


@pytest.mark.slow
def test_who_may_read_the_config_may_read_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    adapt(checkpoint, colour_examples(20), tmp_path / "out", dataclasses.replace(RECIPE, max_steps=1))
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {plain.stat().st_mode}


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "tokenizer.json").unlink()])
def test_a_checkpoint_that_changes_before_the_end_gives_no_tokenizer_to_the_result(
    damage: Callable[[Path], object], force: bool, checkpoint: Path, tmp_path: Path
) -> None:
    source, out, recipe = copy(checkpoint, tmp_path / "in"), tmp_path / "out", dataclasses.replace(RECIPE, max_steps=2)

    def change(progress: Progress) -> None:
        if progress.step == progress.steps:
            damage(source)

    said: list[str] = []
    if force:
        adapt(source, colour_examples(20), out, dataclasses.replace(recipe, max_steps=1))
    way_on = "--resume --force" if force else "--resume"
    with pytest.raises(CheckpointError, match=f"(not as it was|cannot be read).*; put its files .* with {way_on}$"):
        adapt(source, colour_examples(20), out, recipe, AdaptOptions(force=force), say=said.append, progress=change)
    assert out.exists() == force
    assert way_on in said[-1]
    shutil.rmtree(source, ignore_errors=True)
    copy(checkpoint, source)
    adapt(source, colour_examples(20), out, recipe, AdaptOptions(resume=True, force=force))
    assert json.loads((out / "training.json").read_text())["recipe"]["max_steps"] == 2
    assert (out / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_force_replaces_a_checkpoint_of_adapt_when_the_new_one_is_complete(checkpoint: Path, tmp_path: Path) -> None:
    recipe, forced = dataclasses.replace(RECIPE, max_steps=1), AdaptOptions(force=True)
    old, state = tmp_path / "out", tmp_path / "out.training"
    adapt(checkpoint, colour_examples(20), old, recipe)
    before = weights_of(old)

    def stop(progress: Any) -> None:
        raise StoppedError

    for _ in range(2):  # the second time, what the first one left is replaced
        with pytest.raises(StoppedError):
            adapt(checkpoint, colour_examples(20), old, dataclasses.replace(recipe, seed=1), forced, progress=stop)
        assert state.is_dir()
        assert all(torch.equal(value, weights_of(old)[name]) for name, value in before.items())
    adapt(checkpoint, colour_examples(20), old, dataclasses.replace(recipe, seed=1), forced)
    assert json.loads((old / "training.json").read_text())["recipe"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_adapted_or_learnt_from_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    out = copy(checkpoint, tmp_path / "out")
    (out / "training.json").write_text("{}")
    train = write_examples(out / "train.jsonl", colour_examples(20))
    link = tmp_path / "link"
    link.symlink_to(out)
    for source, examples in ((out, colour_examples(20)), (link, colour_examples(20)), (checkpoint, train)):
        with pytest.raises(OutputError, match="is, holds or lies in the input"):
            adapt(source, examples, out, options=AdaptOptions(force=True))
    assert (out / "model.safetensors").exists()
    with pytest.raises(OutputError, match="is, holds or lies in the input"):
        adapt(checkpoint, colour_examples(20), out, options=AdaptOptions(force=True), held_out=train)
    (tmp_path / "rows").mkdir()
    rows = write_examples(tmp_path / "rows" / "train.jsonl", colour_examples(20)).parent
    # --resume, and the next training, would read the log as examples
    for examples, held_out in ((rows, None), (colour_examples(20), rows)):
        with pytest.raises(OutputError, match=r"new is in the input folder .*rows; choose a folder beside it"):
            adapt(checkpoint, examples, rows / "new", RECIPE, held_out=held_out)
    assert list(rows.iterdir()) == [rows / "train.jsonl"]
    state = tmp_path / "new.training"
    state.mkdir()
    with pytest.raises(OutputError, match=r"new\.training is, holds or lies in the input"):
        adapt(checkpoint, write_examples(state / "train.jsonl", colour_examples(20)), tmp_path / "new")


def test_the_tokenizer_stays_and_the_config_says_who_wrote_it_and_that_scores_are_raw(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The model learns labels as its raw output, whatever its authors' tools put on it before."""
    folder = copy(checkpoint, tmp_path / "reranker")
    edit(
        folder / "config.json",
        lambda config: config.update(
            problem_type="single_label_classification",
            sbert_ce_default_activation_function="torch.nn.Sigmoid",
            transformers_version="4.30.2",
        ),
    )
    assert open_checkpoint(folder).score["activation"] == "sigmoid"
    adapt(folder, colour_examples(20), tmp_path / "out", dataclasses.replace(RECIPE, max_steps=1))
    assert open_checkpoint(tmp_path / "out").score == {
        "activation": "identity",
        "told_by": "sentence_transformers.activation_fn",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert (config["torch_dtype"], config["transformers_version"]) == ("float32", "4.30.2")


def test_a_training_that_runs_is_neither_joined_nor_replaced(checkpoint: Path, tmp_path: Path) -> None:
    recipe, refused = dataclasses.replace(RECIPE, max_steps=1), []

    def try_again(progress: Any) -> None:
        for options in (AdaptOptions(resume=True), AdaptOptions(force=True)):
            with pytest.raises(AdaptError, match="another training writes to") as caught:
                adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, options)
            refused.append(caught)

    adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, progress=try_again)
    assert len(refused) == 2


def test_a_folder_in_place_of_the_state_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.training").mkdir()
    with pytest.raises(AdaptError, match="is in the way, and not of a training"):
        adapt(checkpoint, colour_examples(20), tmp_path / "out", options=AdaptOptions(force=True))
    assert (tmp_path / "out.training").is_dir()


@pytest.mark.slow
def test_a_full_disk_at_the_end_leaves_the_saved_state_and_says_how_to_go_on(checkpoint: Path, tmp_path: Path) -> None:
    """A limit of the size of files stands for the full disk: the system and safetensors say both alike."""
    recipe, options = dataclasses.replace(RECIPE, max_steps=2), AdaptOptions(save_every=1)
    said: list[str] = []

    def fill_at_the_end(progress: Progress) -> None:
        if progress.step == progress.steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"File too large: '.*model\.safetensors'"):
            adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, options, say=said.append,
                  progress=fill_at_the_end)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert said[-1] == f"the state of step 1 is kept in {tmp_path / 'out.training'}; go on with --resume"
    adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, dataclasses.replace(options, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_while_the_moments_are_saved_is_told_as_one(checkpoint: Path, tmp_path: Path) -> None:
    """The weights fit, and PyTorch's file behind them does not."""
    recipe, state = dataclasses.replace(RECIPE, max_steps=3), tmp_path / "out.training"

    def fill(progress: Progress) -> None:
        if progress.step == 2:
            size = (state / "step-1" / "model.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = (
        r"state of step 2 cannot be saved to .* \(File too large\); the state of step 1 is kept: make room, and go on"
    )
    try:
        with pytest.raises(AdaptError, match=told):
            adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, AdaptOptions(save_every=1), progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    adapt(checkpoint, colour_examples(20), tmp_path / "out", recipe, AdaptOptions(resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_what_was_learnt_is_kept_if_the_result_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    """And goes on to the same result without a step, however often it cannot."""
    recipe, out = dataclasses.replace(RECIPE, max_steps=3), tmp_path / "out"
    whole = adapt(checkpoint, colour_examples(20), tmp_path / "whole", recipe)
    said: list[str] = []
    steps: list[int] = []

    def run(*, resume: bool) -> dict[str, Any]:
        return adapt(checkpoint, colour_examples(20), out, recipe, AdaptOptions(resume=resume), say=note, progress=step)

    def note(line: str) -> None:
        said.append(line)
        if line == "going on after step 3" and said.count(line) == 1:
            out.mkdir()

    def step(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == progress.steps:
            out.mkdir()

    for resume in (False, True):
        with pytest.raises(OutputError, match="out exists; choose another name"):
            run(resume=resume)
        assert said[-1] == f"the state of step 3 is kept in {out}.training; go on with --resume"
        out.rmdir()
    document = run(resume=True)
    assert steps == [1, 2, 3]
    assert same_weights(tmp_path / "whole", out)
    assert [entry["step"] for entry in document["log"]] == [entry["step"] for entry in whole["log"]] == [0, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_disk_without_space_for_the_weights_is_found_before_anything_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        OutputError, match=r"new has 0\.3 MB left, and the checkpoint alone takes 0\.\d MB; free some space"
    ):
        adapt(checkpoint, tmp_path / "absent.jsonl", tmp_path / "new" / "out", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_log(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.training" / "log.jsonl"

    def fill(progress: Progress) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=rf"File too large: '{log}'"):
            adapt(checkpoint, colour_examples(20), tmp_path / "out", dataclasses.replace(RECIPE, max_steps=2),
                  AdaptOptions(log_every=1), progress=fill)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
