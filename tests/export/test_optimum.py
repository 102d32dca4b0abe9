"""The float32 graph: PyTorch's logits in any shape, and fusions that are demanded."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cappy_engine.errors import GraphError
from cappy_export import ExportOptions, pipeline
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.graphs.bert_cpu import encoder_model
from cappy_export.graphs.build import build_direct_graph, build_graph
from cappy_export.graphs.optimum import build_fused_graph, check_fusions, demanded_fusions
from cappy_export.graphs.writer import Weights
from tests.support.checkpoints import copy, edit, random_inputs


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 33])
@pytest.mark.parametrize("length", [3, 4, 17, 128, 511, 512])
def test_any_batch_and_length_gives_pytorchs_logits(checkpoint: Path, bundle: Path, batch: int, length: int) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    session = onnxruntime.InferenceSession(bundle / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    inputs = random_inputs(batch, length)
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    (found,) = session.run(["logits"], inputs)
    assert found.shape == (batch, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_roberta_is_written_without_padding_and_its_shape_is_told(checkpoint: Path, tmp_path: Path) -> None:
    shape, facts = build_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")
    assert facts == {"written_by": "cappy-export", "opset": 18, "unpadded": True}
    assert (shape["layers"], shape["heads"], shape["hidden_size"]) == (2, 2, 32)
    weights = load_file(checkpoint / "model.safetensors")
    assert shape["parameters"] == sum(value.numel() for name, value in weights.items() if "position_ids" not in name)


def test_a_written_graph_is_checked(checkpoint: Path, tmp_path: Path) -> None:
    def write(config: Any, weights: Weights) -> onnx.ModelProto:
        model = encoder_model(config, weights)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        return model

    with pytest.raises(GraphError, match=r"input_ids of model\.onnx has the axes \[1, 'sequence_length'\]"):
        build_direct_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx", write)


def test_every_layer_is_fused(fused: Path) -> None:
    nodes = Counter(node.op_type for node in onnx.load(fused).graph.node)
    assert (nodes["Attention"], nodes["SkipLayerNormalization"], nodes["BiasGelu"]) == (2, 4, 2)
    assert nodes["Softmax"] == nodes["Erf"] == 0


@pytest.mark.parametrize(("batch", "length"), [(1, 3), (5, 128)])
def test_the_fused_graph_gives_the_written_ones_logits(bundle: Path, fused: Path, batch: int, length: int) -> None:
    inputs = random_inputs(batch, length)
    written, found = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
        for path in (bundle / "onnx/model.onnx", fused)
    )
    np.testing.assert_allclose(found, written, atol=1e-5)


def test_fewer_fusions_than_layers_are_an_error() -> None:
    config = {"model_type": "roberta", "hidden_act": "gelu"}
    complete = {"Attention": 24, "SkipLayerNormalization": 48, "BiasGelu": 24}
    assert demanded_fusions(config, layers=24) == complete
    check_fusions(complete, config, layers=24)
    with pytest.raises(GraphError, match="only 23 of 24 Attention"):
        check_fusions({**complete, "Attention": 23}, config, layers=24)
    with pytest.raises(GraphError, match="0 of 24 BiasGelu"):
        check_fusions({"Attention": 24, "SkipLayerNormalization": 48}, config, layers=24)


def test_what_is_fused_of_an_architecture_without_demands_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_fusions({"SkipLayerNormalization": 12, "BiasGelu": 6}, {"model_type": "distilbert"}, layers=6)
    assert caplog.messages == []
    check_fusions({"SkipLayerNormalization": 1}, {"model_type": "mpnet"}, layers=6)
    check_fusions({}, {"model_type": "mpnet"}, layers=6)
    more = "more is not known to be possible"
    assert caplog.messages == [f"mpnet: fused {{'SkipLayerNormalization': 1}}; {more}", f"mpnet: fused nothing; {more}"]


def test_only_an_exact_gelu_must_be_fused_with_its_bias() -> None:
    assert "BiasGelu" not in demanded_fusions({"model_type": "bert", "hidden_act": "relu"}, layers=2)
    assert demanded_fusions({"model_type": "distilbert"}, layers=2) == {"SkipLayerNormalization": 4, "BiasGelu": 2}
    relu = {"model_type": "distilbert", "activation": "relu"}
    assert demanded_fusions(relu, layers=2) == {"SkipLayerNormalization": 4}
    assert demanded_fusions({"model_type": "deberta-v2"}, layers=2) == {}


def test_weights_beyond_one_file_are_refused_where_optimum_makes_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy_export.graphs.optimum.MAX_BYTES", 1000)
    with pytest.raises(
        GraphError, match=r"more than 0\.0 GB can be exported only of the architectures that are written"
    ):
        build_fused_graph(open_checkpoint(checkpoint), tmp_path / "fused.onnx")
    build_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"precisions": ("fp32", "fp16")}, {}, r"copy has 0\.0 GB of float32 weights; more than 0\.0 GB"),
        ({"targets": ("cuda",)}, {}, r"copy has 0\.0 GB of float32 weights; more than 0\.0 GB"),
        ({}, {"hidden_act": "gelu_new"}, r"copy has 0\.0 GB of float32 weights; more than 0\.0 GB"),
        ({"targets": ("cpu", "tensorrt")}, {"hidden_act": "gelu_new"}, "models for tensorrt are written for BERT and"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_told_before_pytorch_scores(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(pipeline, "score_with_torch", lambda *_, **__: pytest.fail("minutes of work come first"))
    for module in ("graphs.optimum", "gpu_models"):
        monkeypatch.setattr(f"cappy_export.{module}.MAX_BYTES", 1000)
    folder = copy(checkpoint, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(GraphError, match=message):
        pipeline.export(folder, tmp_path / "bundle", ExportOptions(**options))
    assert not (tmp_path / "bundle").exists()


def test_an_architecture_that_optimum_does_not_know_is_told_before_pytorch_scores(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "score_with_torch", lambda *_, **__: pytest.fail("minutes of work come first"))
    folder = copy(checkpoint, tmp_path / "copy")
    other = {"model_type": "roberta-prelayernorm", "architectures": ["RobertaPreLayerNormForSequenceClassification"]}
    edit(folder / "config.json", lambda config: config.update(other))
    with pytest.raises(GraphError, match=r"optimum cannot export copy \(model type roberta-prelayernorm\)"):
        pipeline.export(folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("[enforce fail at file.cc] write failed: No space left on device"),
        ValueError("I/O error: File too large (os error 27)"),
    ],
    ids=str,
)
def test_a_full_disk_or_a_folder_that_is_not_ours_is_no_fault_of_optimum(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("optimum.exporters.onnx.convert.export", fail)
    with pytest.raises(OSError, match=r"No space left on device|File too large|Permission denied"):
        build_fused_graph(open_checkpoint(checkpoint), tmp_path / "fused.onnx")


def test_an_error_without_a_number_is_one_of_the_libraries(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers raises OSError for whatever it cannot load."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("the weights are not there")

    monkeypatch.setattr("optimum.exporters.onnx.convert.export", fail)
    with pytest.raises(GraphError, match=r"optimum cannot export .* \(model type roberta\): the weights are not there"):
        build_fused_graph(open_checkpoint(checkpoint), tmp_path / "fused.onnx")


def test_a_fused_graph_is_checked_and_so_is_how_much_of_it_was_fused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy_export.graphs.optimum.FUSED_PER_LAYER", {"roberta": {"Attention": 2}})
    with pytest.raises(GraphError, match="ONNX Runtime fused only 2 of 4 Attention"):
        build_fused_graph(open_checkpoint(checkpoint), tmp_path / "fused.onnx")
    monkeypatch.undo()
    monkeypatch.setattr("cappy_export.graphs.files.MIN_OPSET", 99)
    with pytest.raises(GraphError, match=r"fused\.onnx has opset 18; at least 99 is needed"):
        build_fused_graph(open_checkpoint(checkpoint), tmp_path / "fused.onnx")


def test_a_large_models_weights_lie_beside_its_graph(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cappy_export.graphs.files.EXTERNAL_BYTES", 1000)
    build_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    inside = sum(len(tensor.raw_data) for tensor in graph.initializer)
    beside = (tmp_path / "model.onnx_data").stat().st_size
    assert inside < beside
    assert (tmp_path / "model.onnx").stat().st_size < beside


def test_weights_in_half_precision_count_as_the_float32_that_they_become(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = shutil.copytree(checkpoint, tmp_path / "half", ignore=shutil.ignore_patterns("*.bin", "*.msgpack"))
    weights = {name: value.bfloat16() for name, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors")
    monkeypatch.setattr("cappy_export.graphs.optimum.MAX_BYTES", (half / "model.safetensors").stat().st_size + 1)
    with pytest.raises(GraphError, match="can be exported only of the architectures that are written directly"):
        build_fused_graph(open_checkpoint(half), tmp_path / "fused.onnx")
