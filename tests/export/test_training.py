"""Training: it learns, is what PyTorch does, and refuses what it cannot do."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from cappy_bench.make_checkpoint import make_family
from cappy_engine.cli.main import main
from cappy_engine.errors import AdaptError
from cappy_export import export
from cappy_export.adaptation.recipe import AdaptOptions
from cappy_export.adaptation.training import adapt
from cappy_export.proof.reference import score_checkpoint
from tests.support.checkpoints import copy
from tests.support.colours import (
    COLOURS,
    RECIPE,
    colour_examples,
    same_weights,
    weights_of,
)


@pytest.mark.slow
def test_a_few_hundred_examples_lower_the_held_out_loss(checkpoint: Path, tmp_path: Path) -> None:
    document = adapt(checkpoint, colour_examples(300), tmp_path / "out", RECIPE, AdaptOptions(held_out_fraction=0.1))
    first, last = document["log"][0], document["log"][-1]
    assert last["held_out_loss"] < 0.8 * min(first["held_out_loss"], 0.25)
    assert last["step"] == math.ceil(document["train"]["examples"] / 16) * 8


@pytest.mark.slow
def test_the_result_is_a_checkpoint_that_transformers_and_export_take(checkpoint: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_steps=2)
    adapt(checkpoint, colour_examples(40), tmp_path / "out", recipe=recipe)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model(**tokenizer([("a", "b")], return_tensors="pt")).logits.shape == (1, 1)
    manifest = export(tmp_path / "out", tmp_path / "bundle")
    assert manifest["source"]["format"] == "safetensors"
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_step_is_what_pytorch_does_with_the_whole_batch_at_once(
    checkpoint: Path, tmp_path: Path, dropout: float
) -> None:
    """Though accumulated over several batches; without a warm-up the first step has the full learning rate."""
    examples = colour_examples(8)
    recipe = dataclasses.replace(
        RECIPE, max_steps=1, batch_size=64, dropout=0.0, warmup_fraction=0.0, max_batch_tokens=64, weight_decay=0.1
    )
    if dropout:
        recipe = dataclasses.replace(recipe, dropout=dropout)
    adapt(checkpoint, examples, tmp_path / "out", recipe, AdaptOptions(held_out_fraction=0.0))
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(examples.pairs, padding=True, return_tensors="pt")
    loss = torch.nn.functional.mse_loss(model(**inputs).logits[:, 0], torch.from_numpy(examples.labels))
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in model.parameters() if value.ndim > 1], "weight_decay": 0.1},
            {"params": [value for value in model.parameters() if value.ndim == 1], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        eps=1e-8,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    moved = {name: value - before[name] for name, value in model.state_dict().items()}
    found = {name: value - before[name] for name, value in weights_of(tmp_path / "out").items()}
    flat = [torch.cat([tensors[name].flatten() for name in sorted(before)]) for tensors in (moved, found)]
    agreement = float(torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0))
    assert (agreement > 0.999) == (dropout == 0.0)  # dropout is real, and only where it was asked for


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(checkpoint: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, max_steps=6, dropout=0.1)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        adapt(checkpoint, colour_examples(60), tmp_path / name, recipe=dataclasses.replace(recipe, seed=seed))
    assert same_weights(tmp_path / "one", tmp_path / "same")
    assert not same_weights(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(("steps", "loss"), [(None, "the loss of step 2"), (1, "the held-out loss after step 1")])
def test_a_loss_that_is_no_number_stops_the_training(
    checkpoint: Path, tmp_path: Path, steps: int | None, loss: str
) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, warmup_fraction=0.0, max_steps=steps)
    with pytest.raises(AdaptError, match=f"{loss} is .*; lower the learning rate"):
        adapt(checkpoint, colour_examples(60), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nothing_is_said_of_what_is_not_measured(checkpoint: Path, tmp_path: Path) -> None:
    recipe, options = dataclasses.replace(RECIPE, max_steps=1), AdaptOptions(held_out_fraction=0.0)
    said: list[str] = []
    adapt(checkpoint, colour_examples(8), tmp_path / "out", recipe, options, say=said.append)
    assert [text.split(",")[0].split(": ")[0] for text in said] == ["16 examples to train on", "step 1 of 1"]


def test_weights_that_are_no_numbers_are_not_written_though_nothing_is_held_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e39, warmup_fraction=0.0, max_steps=1)
    with pytest.raises(AdaptError, match=r"after step \d+: NaN or infinite weights in .*; lower the learning rate"):
        adapt(checkpoint, colour_examples(8), tmp_path / "out", recipe, AdaptOptions(held_out_fraction=0.0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--negatives", "3"], "--negatives goes with --from-samples"),
        (["--held-out", "b.jsonl", "--held-out-fraction", "0.1"], "--held-out-fraction is of TRAIN"),
    ],
)
def test_an_option_that_would_change_nothing_is_wrong_usage(
    words: list[str], problem: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", str(checkpoint), "a.jsonl", str(tmp_path / "out"), *words]) == 2
    assert problem in capsys.readouterr().err


def test_the_command_trains_from_samples(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"instruction": f"Say {word}.", "references": [word], "samples": [word, f"I say {word}", "no"]}
        for word in COLOURS
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["adapt", str(checkpoint), str(tmp_path / "samples.jsonl"), str(tmp_path / "out"), "--from-samples"]
    assert main([*arguments, "--batch-size", "8", "--held-out-fraction", "0.2", "--negatives", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote {tmp_path / 'out'}\n"
    document = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (
        document["train"]["examples"] + document["held_out"]["examples"] == 8 * 5
    )  # 1 reference, 2 negatives, 2 samples
    assert "held out loss" in captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "response": "b"}', "line 1: has no field 'label'"),
        ('{"instruction": "a", "response": "b", "label": 2}', "line 1: has the label 2"),
        ("", "holds no examples"),
    ],
)
def test_the_command_names_the_bad_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (tmp_path / "train.jsonl").write_text(line)
    assert main(["adapt", str(checkpoint), str(tmp_path / "train.jsonl"), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--held-out", "TRAIN"], ["--from-samples"]], ids=" ".join)
def test_a_length_that_leaves_a_pair_no_text_is_found_before_the_examples_are_read(
    words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("not read")
    command = ["adapt", str(checkpoint), str(train), str(tmp_path / "out"), "--max-length", "4"]
    assert main([*command, *(str(train) if word == "TRAIN" else word for word in words)]) == 1
    assert "max_length 4 leaves a pair no text; at least 8 is needed" in capsys.readouterr().err


def test_held_out_examples_of_a_file_are_measured_and_not_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    train, held_out = colour_examples(40), colour_examples(12)
    recipe = dataclasses.replace(RECIPE, max_steps=1)
    document = adapt(checkpoint, train, tmp_path / "out", held_out=held_out, recipe=recipe)
    assert document["train"]["examples"] == len(train)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        scores = model(**tokenizer(held_out.pairs, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    expected = float(np.square(scores - held_out.labels).mean())
    assert document["log"][0]["held_out_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("first", [0, 40])
def test_held_out_examples_that_are_trained_on_too_are_pointed_out(
    checkpoint: Path, tmp_path: Path, first: int
) -> None:
    """As where the held-out file lies in the folder TRAIN."""
    said: list[str] = []
    held_out = colour_examples(52).take(np.arange(first, first + 12))
    recipe = dataclasses.replace(RECIPE, max_steps=1)
    adapt(checkpoint, colour_examples(20), tmp_path / "out", held_out=held_out, recipe=recipe, say=said.append)
    notes = [text for text in said if "12 held-out examples are in TRAIN, too" in text]
    assert len(notes) == (1 if first == 0 else 0)


@pytest.mark.slow
def test_a_model_without_a_padding_id_is_padded_with_the_tokenizers(checkpoint: Path, tmp_path: Path) -> None:
    """BERT's scores do not depend on it, so `pad_token_id: null` is a whole model, to adapt and to export."""
    folder = copy(checkpoint, tmp_path / "bert", weights=None)
    shape = {"vocab_size": 3245, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**shape, intermediate_size=32, pad_token_id=None, num_labels=1)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    adapt(folder, colour_examples(16), tmp_path / "out", dataclasses.replace(RECIPE, epochs=1))
    assert export(tmp_path / "out", tmp_path / "bundle")["model"]["pad_token_id"] == 1


@pytest.mark.slow
def test_a_default_of_the_config_that_is_left_out_is_still_the_models(tmp_path: Path) -> None:
    """BERT has two types of tokens unless its config says otherwise: adapting measures what PyTorch gives."""
    folder = make_family(tmp_path / "bert", "ms-marco-MiniLM-L6-v2", is_tiny=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("type_vocab_size") == 2
    path.write_text(json.dumps(config))
    examples = colour_examples(8)
    recipe = dataclasses.replace(RECIPE, max_steps=1)
    document = adapt(folder, examples, tmp_path / "out", recipe=recipe, held_out=examples)
    scores = score_checkpoint(folder, examples.pairs)
    assert document["log"][0]["held_out_loss"] == pytest.approx(np.square(scores - examples.labels).mean(), rel=1e-4)
