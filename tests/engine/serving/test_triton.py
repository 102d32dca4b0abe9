"""A model repository for Triton follows its schema, and says what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, OutputError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.triton import TritonOptions, pbtxt, write_repository
from cappy_engine.session import open_session

OPTIONS = ScorerOptions(precision="int8", threads=1)


def read_config(folder: Path) -> dict[str, list[Any]]:
    """Read config.pbtxt by its lines: each field is a list, as if all could be there several times."""
    return read_fields(iter((folder / "config.pbtxt").read_text().splitlines()))


def read_fields(lines: Iterator[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for line in map(str.strip, lines):
        if line == "}":
            break
        name, _, value = line.removesuffix(" {").partition(": ")
        is_literal = value[:1] == '"' or value.lstrip("-").isdecimal() or value in ("true", "false")
        read = read_fields(lines) if line.endswith(" {") else json.loads(value) if is_literal else value
        found.setdefault(name, []).append(read)
    return found


def parameters(config: dict[str, list[Any]]) -> dict[str, dict[str, str]]:
    """Give the parameters as Triton hands them to a model."""
    return {each["key"][0]: {"string_value": each["value"][0]["string_value"][0]} for each in config["parameters"]}


def tensors(config: dict[str, list[Any]], field: str) -> list[tuple[str, str, list[int]]]:
    return [(each["name"][0], each["data_type"][0], each["dims"]) for each in config[field]]


@pytest.mark.parametrize("device", ["cpu", "tensorrt"])
def test_the_configs_follow_the_published_schema(bundle: Path, tmp_path: Path, device: Any) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    for folder in write_repository(bundle, tmp_path, ScorerOptions(device=device), TritonOptions(name="mini")):
        message = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
        assert message.name == folder.name


def test_the_configs_say_what_was_asked(bundle: Path, tmp_path: Path) -> None:
    asked = TritonOptions(
        name="mini", max_queue=7, max_pairs=100, delay_microseconds=50, request_seconds=3, too_long="refuse"
    )
    texts, tokens = write_repository(bundle, tmp_path, OPTIONS, asked)
    config = read_config(texts)
    assert (config["name"], config["backend"], config["max_batch_size"]) == (["mini"], ["python"], [100])
    assert tensors(config, "input") == [("instruction", "TYPE_STRING", [1]), ("response", "TYPE_STRING", [1])]
    assert tensors(config, "output") == [
        ("score", "TYPE_FP32", [1]), ("truncated", "TYPE_BOOL", [1]), ("tokens", "TYPE_INT32", [1]),
    ]  # fmt: skip
    (batching,) = config["dynamic_batching"]
    assert batching["max_queue_delay_microseconds"] == [50]
    assert batching["default_queue_policy"] == [
        {
            "timeout_action": ["REJECT"],
            "default_timeout_microseconds": [3_000_000],
            "allow_timeout_override": [True],
            "max_queue_size": [7],
        }
    ]
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    assert parameters(config)["too_long"] == {"string_value": "refuse"}
    config = read_config(tokens)
    assert (config["name"], config["backend"], config["max_batch_size"]) == (["mini-onnx"], ["onnxruntime"], [64])
    assert tensors(config, "input") == [("input_ids", "TYPE_INT64", [-1]), ("attention_mask", "TYPE_INT64", [-1])]
    assert tensors(config, "output") == [("logits", "TYPE_FP32", [1])]
    assert (tokens / "1" / config["default_model_filename"][0]).is_file()


def test_models_for_gpus_have_an_instance_on_each(bundle: Path, tmp_path: Path) -> None:
    options = ScorerOptions(device="tensorrt", gpus=(1, 3))
    texts, tokens = write_repository(bundle, tmp_path, options, TritonOptions())
    config = read_config(texts)
    assert config["instance_group"] == [{"count": [1], "kind": ["KIND_GPU"], "gpus": [1, 3]}]
    written = parameters(config)["options"]["string_value"]
    assert ScorerOptions.from_json(written) == ScorerOptions(device="tensorrt", precision="fp32")
    assert open_bundle(texts / "1" / "bundle").manifest.targets == {"tensorrt": ("fp32",)}
    config = read_config(tokens)
    assert [name for name, _, _ in tensors(config, "input")] == ["input_ids", "attention_mask", "position_ids"]
    (accelerators,) = config["optimization"][0]["execution_accelerators"]
    assert accelerators["gpu_execution_accelerator"] == [{"name": ["tensorrt"]}]


def test_a_bundle_that_was_changed_is_not_written(copy: Path, tmp_path: Path) -> None:
    model = open_bundle(copy).model("int8", "cpu")
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError):
        write_repository(copy, tmp_path / "models", OPTIONS, TritonOptions())
    assert not any((tmp_path / "models").glob("cappy*"))


@pytest.mark.slow
def test_the_model_of_tokens_scores_without_our_kernels(tmp_path: Path) -> None:
    _, tokens = write_repository(EMBEDDED, tmp_path, OPTIONS, TritonOptions())
    (model,) = (tokens / "1").glob("*.onnx")
    with Scorer.open_with(EMBEDDED, OPTIONS) as scorer:
        encoded = scorer.encode([("Is the sky blue?", "Yes"), ("Is the sea blue?", "No")])
        expected = scorer.score_encoded(encoded).scores
    ids = np.stack(encoded.token_ids)  # of one length, as Triton batches them
    found = open_session(model, threads=1).run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.slow
def test_nothing_is_written_over(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["triton", str(EMBEDDED), str(tmp_path / "models"), "--name", "mini"]
    assert main(arguments) == 0
    assert "wrote" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["mini", "mini-onnx"]
    assert main(arguments) == 1
    with pytest.raises(OutputError, match=r"mini exists; choose another --name, or remove it"):
        write_repository(bundle, tmp_path / "models", OPTIONS, TritonOptions(name="mini"))


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a" * 101])
def test_names_that_are_no_folders_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be letters"):
        TritonOptions(name=name)


@pytest.mark.parametrize(
    ("name", "most"),
    [("max_pairs", 2**31 - 1), ("max_queue", 2**32 - 1), ("request_seconds", 10**9), ("delay_microseconds", 2**62)],
)
def test_numbers_that_tritons_configuration_cannot_hold_are_refused(name: str, most: int) -> None:
    """Its max_batch_size is an int32, max_queue_size a uint32, and times are uint64 of microseconds."""
    assert getattr(TritonOptions(**{name: most}), name) == most  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} must be at most {most}, got {most + 1}"):
        TritonOptions(**{name: most + 1})  # type: ignore[arg-type]


def test_texts_are_quoted() -> None:
    message = {"a": 'say "é\n"', "b": [1, 2], "c": {"d": True}}
    assert pbtxt(message) == 'a: "say \\"\\u00e9\\n\\""\nb: 1\nb: 2\nc {\n  d: true\n}\n'
