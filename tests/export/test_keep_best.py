"""`--keep-best`: the result has the weights of the evaluation with the least held-out loss."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy_engine.errors import AdaptError
from cappy_export.adaptation.examples import Examples, make_examples
from cappy_export.adaptation.log import Progress, tell_of_result
from cappy_export.adaptation.recipe import AdaptOptions
from cappy_export.adaptation.training import adapt
from tests.support.colours import RECIPE, StoppedError, colour_examples, same_weights

HELD_OUT = make_examples([("The sea", "is blue"), ("The sea", "is dry"), ("Grass", "is green")], [1.0, 0.0, 1.0])
"""Has nothing to do with what is trained on, so that its loss goes up and down."""
LAST = 12
RISING = dataclasses.replace(RECIPE, learning_rate=5e-3, max_steps=LAST, keep_best=True)
EVERY = AdaptOptions(evaluate_every=2, save_every=5)


def run(
    checkpoint: Path, out: Path, recipe: Any = RISING, options: AdaptOptions = EVERY, **more: Any
) -> dict[str, Any]:
    return adapt(checkpoint, colour_examples(40), out, recipe, options, held_out=HELD_OUT, **more)


def losses_of(document: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["held_out_loss"] for entry in document["log"] if entry["step"]}


def loss_by_transformers(folder: Path, examples: Examples) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.inference_mode():
        for pair in examples.pairs:
            found.append(float(model(**tokenizer(*pair, return_tensors="pt")).logits[0, 0]))
    return float(np.square(np.array(found, np.float32) - examples.labels).mean())


def stopping_at(step: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.step == step:
            raise StoppedError

    return stop


def spoil(state: Path, fault: str) -> None:
    if fault == "gone":
        shutil.rmtree(state)
    else:
        (state / "model.safetensors").write_bytes(b"no weights")


def test_the_weights_of_the_best_evaluation_are_written(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    document = run(checkpoint, tmp_path / "out", say=said.append)
    losses = losses_of(document)
    best = min(losses, key=lambda step: losses[step])
    assert best not in (min(losses), LAST), losses  # or the test would say little
    assert document["step"] == best
    assert loss_by_transformers(tmp_path / "out", HELD_OUT) == pytest.approx(losses[best], rel=1e-4)
    assert (
        f"the weights are those of step {best} of {LAST}, the best evaluation: held-out loss {losses[best]:.4g}" in said
    )
    assert not (tmp_path / "out.training").exists()


def test_without_it_the_last_weights_are_written_and_a_note_tells_of_better_ones(
    checkpoint: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    recipe = dataclasses.replace(RISING, keep_best=False)
    document = run(checkpoint, tmp_path / "out", recipe, say=said.append)
    losses = losses_of(document)
    best = min(losses, key=lambda step: losses[step])
    assert document["step"] == LAST
    assert loss_by_transformers(tmp_path / "out", HELD_OUT) == pytest.approx(losses[LAST], rel=1e-4)
    assert said[-1].startswith(f"note: the held-out loss was least after step {best}, {losses[best]:.4g}, and ")


@pytest.mark.parametrize("stop", [7, 9, LAST])
def test_a_training_that_was_stopped_comes_to_the_same_best_weights(
    checkpoint: Path, tmp_path: Path, stop: int
) -> None:
    whole = run(checkpoint, tmp_path / "whole")

    with pytest.raises(StoppedError):
        run(checkpoint, tmp_path / "parts", progress=stopping_at(stop))
    resumed = run(checkpoint, tmp_path / "parts", options=dataclasses.replace(EVERY, resume=True))
    assert resumed["step"] == whole["step"]
    assert losses_of(resumed) == losses_of(whole)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_only_the_newest_state_and_the_best_one_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    folder, seen = tmp_path / "out.training", []

    def look(progress: Progress) -> None:
        seen.append({int(path.name.removeprefix("step-")) for path in folder.glob("step-*")})

    losses = losses_of(run(checkpoint, tmp_path / "out", progress=look))
    for step, states in enumerate(seen, start=1):  # before the states of this step are saved
        measured = [each for each in losses if each < step]
        best = min(measured, key=lambda each: losses[each], default=0)
        improved = [
            each for each in measured if losses[each] == min(losses[other] for other in measured if other <= each)
        ]
        newest = max((*improved, *range(5, step, 5)), default=0)
        assert states == {best, newest} - {0}


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_best_state_that_cannot_be_read_is_told_before_the_training_goes_on(
    checkpoint: Path, tmp_path: Path, fault: str
) -> None:
    with pytest.raises(StoppedError):
        run(checkpoint, tmp_path / "out", progress=stopping_at(LAST))
    states = sorted((tmp_path / "out.training").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    assert len(states) == 2
    spoil(states[0], fault)
    steps: list[Progress] = []
    with pytest.raises(AdaptError, match=rf"{states[0]} cannot be read \(.*safetensors is (missing|damaged)\)"):
        run(checkpoint, tmp_path / "out", options=dataclasses.replace(EVERY, resume=True), progress=steps.append)
    assert steps == []


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_best_state_that_is_lost_meanwhile_leaves_that_of_the_last_step(
    checkpoint: Path, tmp_path: Path, fault: str
) -> None:
    def lose(progress: Progress) -> None:
        if progress.step == LAST:
            spoil(min((tmp_path / "out.training").glob("step-*"), key=lambda path: len(path.name)), fault)

    with pytest.raises(AdaptError, match=r"safetensors is (missing|damaged)"):
        run(checkpoint, tmp_path / "out", progress=lose)
    assert (tmp_path / "out.training" / f"step-{LAST}").is_dir()


def test_a_training_of_a_version_without_it_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RISING, keep_best=False)

    with pytest.raises(StoppedError):
        run(checkpoint, tmp_path / "out", recipe, progress=stopping_at(6))
    path = tmp_path / "out.training" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["recipe"]["keep_best"]
    path.write_text(json.dumps(settings))
    assert run(checkpoint, tmp_path / "out", recipe, dataclasses.replace(EVERY, resume=True))["step"] == LAST


def test_it_cannot_be_changed_when_a_training_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(checkpoint, tmp_path / "out", dataclasses.replace(RISING, keep_best=False), progress=stopping_at(6))
    with pytest.raises(AdaptError, match="keep_best"):
        run(checkpoint, tmp_path / "out", options=dataclasses.replace(EVERY, resume=True))


def test_without_held_out_examples_it_is_refused_before_anything_is_read(checkpoint: Path, tmp_path: Path) -> None:
    options = AdaptOptions(held_out_fraction=0)
    with pytest.raises(AdaptError, match="--keep-best takes the least held-out loss, and nothing is held out"):
        adapt(checkpoint, tmp_path / "nothing.jsonl", tmp_path / "out", RISING, options)


@pytest.mark.parametrize(
    ("losses", "is_best", "told"),
    [
        ({0: 0.3, 2: 0.2, 4: 0.1}, False, []),
        ({0: 0.3, 2: 0.1, 4: 0.101}, False, []),  # chance
        (
            {0: 0.3, 2: 0.1, 4: 0.2},
            False,
            [
                "note: the held-out loss was least after step 2, 0.1, and 0.2 in the end; "
                "--keep-best writes the weights of the best evaluation"
            ],
        ),
        (
            {0: 0.3, 2: 0.1, 4: 0.1},
            True,
            ["the weights are those of step 2 of 4, the best evaluation: held-out loss 0.1"],
        ),
        (
            {0: 0.1, 2: 0.3, 4: 0.2},
            True,
            [
                "note: the held-out loss was 0.1 before the first step, and never less after it",
                "the weights are those of step 4 of 4, the best evaluation: held-out loss 0.2",
            ],
        ),
    ],
)
def test_what_is_told_of_the_result(losses: dict[int, float], is_best: bool, told: list[str]) -> None:
    entries = [{"step": step, "held_out_loss": loss} for step, loss in losses.items()]
    assert tell_of_result(entries, 4, is_best=is_best) == told


def test_nothing_is_told_where_nothing_was_measured() -> None:
    assert tell_of_result([{"step": 0}, {"step": 4, "loss": 0.1}], 4, is_best=False) == []
