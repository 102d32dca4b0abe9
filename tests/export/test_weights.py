"""Weights of every format: the same bytes, and refused where they are unsafe or do not fit."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import float32_bytes, load_model, open_checkpoint, shape_model
from cappy_export.checkpoints.weights import read_weights
from tests.support.checkpoints import FILES, copy, edit


def test_all_formats_give_the_same_bytes(checkpoint: Path) -> None:
    weights = {name: read_weights([checkpoint / file], name) for name, file in FILES.items()}
    assert "jax" not in sys.modules
    assert "flax" not in sys.modules
    expected = load_file(checkpoint / "model.safetensors")
    for found in weights.values():
        assert set(found) == set(expected)
        assert all(found[key].numpy().tobytes() == expected[key].numpy().tobytes() for key in expected)


def write_shards(checkpoint: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Make a copy of the checkpoint whose weights lie in two files with an index; return the weights."""
    copy(checkpoint, folder, weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    keys = sorted(weights)
    stem, ending = FILES[kind].rsplit(".", 1)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
        name = f"{stem}-{number:05}-of-00002.{ending}"
        shard = {key: weights[key] for key in part}
        save_file(shard, folder / name) if kind == "safetensors" else torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{FILES[kind]}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    weights = write_shards(checkpoint, tmp_path / "copy", kind)
    model = load_model(open_checkpoint(tmp_path / "copy"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_an_index_that_does_not_fit_its_shards_is_named(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(checkpoint, tmp_path / "copy", "safetensors")
    index = tmp_path / "copy" / "model.safetensors.index.json"
    first = json.loads(index.read_text())["weight_map"]
    lost = [name for name in first if ".layer.1." in name]
    for shard in sorted(set(first.values())):
        kept = {name: value for name, value in load_file(tmp_path / "copy" / shard).items() if name not in lost}
        save_file(kept, tmp_path / "copy" / shard)
    with pytest.raises(
        CheckpointError, match=rf"index\.json names {len(lost)} weights that its files do not have: rob"
    ):
        load_model(open_checkpoint(tmp_path / "copy"))


def test_an_index_may_name_weights_that_the_model_does_not_need(checkpoint: Path, tmp_path: Path) -> None:
    """As the hub's converter to safetensors writes it, where two weights were the same."""
    write_shards(checkpoint, tmp_path / "copy", "safetensors")
    index = tmp_path / "copy" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.decoder.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    load_model(open_checkpoint(tmp_path / "copy"))


def test_every_missing_unexpected_and_misshapen_key_is_in_one_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.dense.bias"], weights["classifier.out_proj.weight"]
    weights["classifier.extra"] = torch.zeros(3)
    weights["classifier.dense.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(folder))
    for text in (
        "2 missing: classifier.dense.bias, classifier.out_proj.weight",
        "1 unexpected: classifier.extra",
        "1 of another shape: classifier.dense.weight (2, 2) instead of (32, 32)",
    ):
        assert text in str(caught.value)


def test_old_names_and_buffers_are_understood(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for key, value in weights.items()}  # fmt: skip
    torch.save(old | {"roberta.embeddings.position_ids": torch.arange(514)[None]}, folder / "pytorch_model.bin")
    model = load_model(open_checkpoint(folder))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_half_precision_weights_become_float32(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = {key: value.bfloat16() for key, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    edit(folder / "config.json", lambda config: config.update(torch_dtype="bfloat16"))
    model = load_model(open_checkpoint(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in weights.items())


def test_the_space_that_is_needed_is_that_of_float32_also_for_halves(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    save_file({key: value.half() for key, value in weights.items()}, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert float32_bytes(opened, shape_model(opened)) == 4 * sum(value.numel() for value in weights.values())


def test_nan_weights_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.dense.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in classifier\.dense\.bias"):
        load_model(open_checkpoint(folder))


class Bomb:
    """What a hostile pickle holds: an object that runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path, legacy: bool) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    mark = tmp_path / "it-ran"
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="could run code"):
        load_model(open_checkpoint(folder))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud, and this test proves nothing"


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_weights_file_is_named(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=kind)
    content = (folder / FILES[kind]).read_bytes()
    (folder / FILES[kind]).write_bytes(content[: len(content) // 3])
    with pytest.raises(CheckpointError, match=FILES[kind]):
        load_model(open_checkpoint(folder))


def test_a_weight_that_occurs_twice_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    weights = load_file(checkpoint / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file(weights, folder / names[0])
    save_file({"classifier.dense.bias": weights["classifier.dense.bias"] + 1}, folder / names[1])
    index = {"weight_map": dict.fromkeys(weights, names[0]) | {"classifier.dense.bias": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"classifier\.dense\.bias for the second time"):
        load_model(open_checkpoint(folder))
