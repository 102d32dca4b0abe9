"""Weights that nobody's training leaves: refused by name, in few words, before memory is taken for the model."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints import checkpoint as checkpoints
from cappy_export.checkpoints import models
from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint, shape_model
from cappy_export.checkpoints.flax import read_flax
from tests.support.checkpoints import copy, edit

NAME = "roberta.encoder.layer.0.output.dense.bias"


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def refusal(checkpoint: Path, folder: Path, content: object) -> str:
    """The error for a `pytorch_model.bin` with this content."""
    copied = copy(checkpoint, folder, weights=None)
    torch.save(content, copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(copied))
    return str(caught.value)


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float8_e4m3fn": lambda value: value.to(torch.float8_e4m3fn),
    "complex64": lambda value: value + 1j,
    "int8": lambda value: value.to(torch.int8),
    "bool": lambda value: value > 0,
    "torch.sparse_coo": lambda value: value.to_sparse(),
    "quantised": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "on the device meta": lambda value: value.to("meta"),
    "nested": lambda value: torch.nested.nested_tensor([value]),
    "its elements share memory": lambda value: value[:1].expand(value.shape),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_tensor_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor], kind: str
) -> None:
    message = refusal(checkpoint, tmp_path / "copy", weights | {NAME: ODD[kind](weights[NAME])})
    assert f"1 weights are not plain tensors of float32, float16, bfloat16, float64: {NAME} ({kind})" in message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda weights: {1: torch.zeros(1), **weights}, "must hold a map of names to tensors"),
        (lambda weights: {"state_dict": weights}, "must hold a map of names to tensors"),
        (lambda weights: [*weights.values()], "must hold a map of names to tensors"),
        (lambda weights: torch.zeros(3), "must hold a map of names to tensors"),
        (
            lambda weights: weights | {NAME: torch.full_like(weights[NAME], 1e300, dtype=torch.float64)},
            "NaN or infinite",
        ),
        (lambda weights: weights | {NAME: weights[NAME][None]}, "1 of another shape"),
        (lambda weights: weights | {NAME: torch.tensor(1.0)}, "1 of another shape"),
    ],
)
def test_other_odd_content_is_refused(
    checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor], change: Any, text: str
) -> None:
    assert text in refusal(checkpoint, tmp_path / "copy", change(weights))


def test_views_and_tied_weights_are_plain(checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A slice of a larger tensor, a transposed one, and two names of one tensor have values like any other."""
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    square = "classifier.dense.weight"
    sliced = torch.cat([weights[NAME], torch.zeros(5)])[: len(weights[NAME])]
    tied = {"lm_head.decoder.weight": weights["roberta.embeddings.word_embeddings.weight"]}
    torch.save(weights | {NAME: sliced, square: weights[square].T.contiguous().T} | tied, folder / "pytorch_model.bin")
    loaded = load_model(open_checkpoint(folder)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_bin_is_refused(checkpoint: Path, tmp_path: Path, part: float, legacy: bool) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    path = folder / "pytorch_model.bin"
    torch.save(load_file(checkpoint / "model.safetensors"), path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (cannot be read|was refused)"):
        load_model(open_checkpoint(folder))


def test_a_compressed_bin_is_refused_before_it_is_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights="bin")
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    (tmp_path / "x").rename(path)
    with pytest.raises(CheckpointError, match="has compressed parts"):
        load_model(open_checkpoint(folder))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_one_line(
    checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor], prefix: str
) -> None:
    message = refusal(checkpoint, tmp_path / "copy", {prefix + name: value for name, value in weights.items()})
    assert f"all {len(weights)} names of the weights begin with '{prefix}'" in message
    assert f"name.removeprefix('{prefix}')" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_weights_with_an_adapter_of_peft_are_to_be_merged(
    checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor], prefix: str
) -> None:
    names = {NAME: NAME.replace(".bias", ".base_layer.bias")} if prefix else {}
    adapted = {prefix + names.get(name, name): value for name, value in weights.items()}
    adapted[prefix + NAME.replace(".bias", ".lora_A.default.weight")] = torch.zeros(1)
    message = refusal(checkpoint, tmp_path / "copy", adapted)
    assert "an adapter of PEFT, such as LoRA, is beside the weights: " in message
    assert "merge_and_unload()" in message
    assert "removeprefix" not in message


def test_messages_do_not_list_all_weights(checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    strange = {f"strange.{number}.\x1b[2J{'x' * 500}": torch.zeros(1) for number in range(1000)}
    message = refusal(checkpoint, tmp_path / "unexpected", weights | strange)
    assert "1000 unexpected: 'strange.0." in message
    assert "and 992 more" in message
    assert "\x1b" not in message
    assert len(message) < 1500
    none = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
    assert len(refusal(checkpoint, tmp_path / "nan", none)) < 1500
    assert len(refusal(checkpoint, tmp_path / "int", {name: value.int() for name, value in weights.items()})) < 1500
    missing = refusal(checkpoint, tmp_path / "missing", {NAME: weights[NAME]})
    assert "layers" in missing
    assert len(missing) < 1500


def test_weights_of_other_heads_are_left_out_and_said(
    checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(checkpoint, tmp_path / "copy", weights=None)
    others = {
        "lm_head.bias": torch.zeros(3),
        "lm_head.layer_norm.weight": torch.ones(32),
        "lm_predictions.lm_head.bias": torch.zeros(3),
        "roberta.pooler.dense.weight": torch.zeros(32, 32),
        "roberta.pooler.dense.bias": torch.zeros(32, dtype=torch.int8),
        "roberta.embeddings.position_ids": torch.arange(514)[None],
    }
    save_file(weights | others, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = load_model(open_checkpoint(folder)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("cappy_export")]
    assert said == (
        "copy: ignoring 5 weights that its model does not use: lm_head.bias, lm_head.layer_norm.weight, "
        "lm_predictions.lm_head.bias, roberta.pooler.dense.bias, roberta.pooler.dense.weight"
    )


@pytest.mark.parametrize("name", ["roberta.adapter.weight", "classifier2.weight", "roberta.encoder.layer.0.lora_A"])
def test_other_weights_that_the_model_does_not_use_are_refused(
    checkpoint: Path, tmp_path: Path, weights: dict[str, torch.Tensor], name: str
) -> None:
    assert f"1 unexpected: {name}" in refusal(checkpoint, tmp_path / "copy", weights | {name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_hidden_layers": 100_000}, "config.json has 100000 as num_hidden_layers, and the weights have 2"),
        ({"num_hidden_layers": 1}, "config.json has 1 as num_hidden_layers, and the weights have 2"),
        ({"num_attention_heads": 10**9}, "config.json has 1000000000 as num_attention_heads; at most 1000"),
        ({"hidden_size": 2**30}, "of another shape"),
        ({"vocab_size": 2**31 - 1}, "1 of another shape: roberta.embeddings.word_embeddings.weight (3245, 32) instead"),
        ({"max_position_embeddings": 2**31 - 1}, "1 of another shape"),
        ({"intermediate_size": 2**31 - 1}, "of another shape"),
        ({"hidden_size": 2**31 - 1}, "copy"),
        ({"num_attention_heads": 3}, "describes no model"),
    ],
)
def test_a_config_that_cannot_fit_takes_neither_time_nor_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], text: str
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(change))
    build = models.build_model

    def hollow_only(config: Any, *, is_hollow: bool = False) -> Any:
        assert is_hollow, "memory was taken for a model that does not fit"
        return build(config, is_hollow=True)

    monkeypatch.setattr(checkpoints, "build_model", hollow_only)
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(folder))
    assert text in str(caught.value)


def test_a_model_of_more_layers_than_any_has_is_not_even_shaped(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=1001))
    with pytest.raises(CheckpointError, match="has 1001 as num_hidden_layers; at most 1000 can be"):
        shape_model(open_checkpoint(folder))


def ext(*content: object, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(content))


FOUR = np.ones(1, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"a": ext((1,), "int8", b"1")}, "of the type 'int8'; known are float32"),
        ({"a": ext((1,), "complex64", FOUR * 2)}, "of the type 'complex64'"),
        ({"a": ext((1,), "(" * 200 + "2,)f4", FOUR)}, "of the type"),
        ({"a": ext((1,), "f4,(1+1,)f4", FOUR)}, "of the type 'f4,(1+1,)f4'"),
        ({"a": ext((1,), 5, FOUR)}, "of the type 5"),
        ({"a": ext((2**62, 2**62), "float32", FOUR)}, "has 4 bytes"),
        ({"a": ext((-1,), "float32", FOUR)}, "is not a shape"),
        ({"a": ext((1.0,), "float32", FOUR)}, "is not a shape"),
        ({"a": ext("ab", "float32", FOUR)}, "is not a shape"),
        ({"a": ext((1,) * 40, "float32", FOUR)}, "is not a shape"),
        ({"a": ext((1,), "float32", "text")}, "has 4 bytes"),
        ({"a": ext((1,), "float32")}, "not enough values"),
        ({1: ext((1,), "float32", FOUR)}, "1 is not a name"),
        ({b"a": ext((1,), "float32", FOUR)}, "is not a name"),
        ({"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}, "not a map of names"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}, "chunks": {"0": "x"}}}, "do not make the shape"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2**62}, "chunks": {}}}, "do not make the shape"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": [1], "chunks": [1]}}, "indices must be"),
        ({"a": msgpack.Timestamp(1)}, "not an array"),
    ],
)
def test_odd_msgpack_is_refused(tmp_path: Path, tree: object, text: str) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(msgpack.packb(tree))
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack is not a Flax checkpoint") as caught:
        read_flax(path)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 1000
