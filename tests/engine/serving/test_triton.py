"""A model repository for Triton follows its schema, and its Python model answers each request for itself."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.cli.main import main
from cappy_engine.errors import BundleError, OutputError, ScoringError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.triton import TritonOptions, pbtxt, write_repository
from cappy_engine.session import open_session

OPTIONS = ScorerOptions(precision="int8", threads=1)


@dataclass
class Tensor:
    """A tensor, as Triton's Python backend has it."""

    name: str
    values: Any

    def as_numpy(self) -> Any:
        return self.values


@dataclass
class Request:
    """A request of texts, each tensor (n, 1)."""

    instruction: list[bytes]
    response: list[bytes]
    is_given_up: bool = False

    def is_cancelled(self) -> bool:
        return self.is_given_up


class TritonError(Exception):
    """An error of one request, with its code."""

    INTERNAL, INVALID_ARG, CANCELLED = 1, 2, 3


@dataclass
class Response:
    """The answer to a request."""

    output_tensors: list[Tensor]
    error: Any = None
    found: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.found = {tensor.name: tensor.values for tensor in self.output_tensors}


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the module that exists only where Triton runs."""
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, Response
    module.get_input_tensor_by_name = lambda request, name: Tensor(
        name, np.array([[text] for text in getattr(request, name)], dtype=object)
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)


def load(folder: Path, kind: str = "CPU") -> Any:
    """Load model.py as Triton does, by its path."""
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = read_config(folder)
    parameters = {each["key"]: each["value"] for each in config["parameters"]}
    model.initialize(
        {
            "model_config": json.dumps({**config, "parameters": parameters}),
            "model_instance_kind": kind,
            "model_instance_device_id": "0",
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.pbtxt by the published schema where that is installed, else by its lines."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import json_format, text_format

    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    message = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    config: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    config["parameters"] = [{"key": key, "value": value} for key, value in config.get("parameters", {}).items()]
    return config


def test_the_configs_follow_the_published_schema(bundle: Path, tmp_path: Path) -> None:
    texts, tokens = write_repository(bundle, tmp_path, OPTIONS, TritonOptions(name="mini", max_queue=7, max_pairs=100))
    config = read_config(texts)
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("mini", "python", 100)
    assert [(each["name"], each["data_type"]) for each in config["input"]] == [
        ("instruction", "TYPE_STRING"), ("response", "TYPE_STRING"),
    ]  # fmt: skip
    assert config["dynamic_batching"]["default_queue_policy"]["max_queue_size"] == 7
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    config = read_config(tokens)
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("mini-onnx", "onnxruntime", 64)
    assert {each["name"]: each["data_type"] for each in config["input"]} == {
        "input_ids": "TYPE_INT64", "attention_mask": "TYPE_INT64",
    }  # fmt: skip
    assert (tokens / "1" / config["default_model_filename"]).is_file()


def test_models_for_gpus_have_an_instance_on_each(bundle: Path, tmp_path: Path) -> None:
    options = ScorerOptions(device="tensorrt", gpus=(1, 3))
    texts, tokens = write_repository(bundle, tmp_path, options, TritonOptions())
    config = read_config(texts)
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "gpus": [1, 3]}]
    written = next(each["value"]["string_value"] for each in config["parameters"] if each["key"] == "options")
    assert ScorerOptions.from_json(written) == ScorerOptions(device="tensorrt", precision="fp32")
    assert open_bundle(texts / "1" / "bundle").manifest.targets == {"tensorrt": ("fp32",)}
    config = read_config(tokens)
    assert [each["name"] for each in config["input"]] == ["input_ids", "attention_mask", "position_ids"]
    accelerators = config["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
    assert accelerators == [{"name": "tensorrt"}]


def test_requests_that_triton_batches_are_answered_each_for_itself(bundle: Path, tmp_path: Path, triton: None) -> None:
    texts, _ = write_repository(bundle, tmp_path, OPTIONS, TritonOptions())
    model = load(texts)
    requests = [
        Request([b"Is the sky blue?"] * 2, [b"Yes", "Où? 日本".encode()]),
        Request([b"Is it?"], [b"\xff"]),
        Request([b"Is it?"], [b"no"], is_given_up=True),
        Request([b"Is it?"], [b"word " * 700]),
        Request([], []),
    ]
    first, broken, given_up, long, empty = model.execute(requests)
    with Scorer.open_with(bundle, OPTIONS) as scorer:
        pairs = [("Is the sky blue?", "Yes"), ("Is the sky blue?", "Où? 日本"), ("Is it?", "word " * 700)]
        expected = scorer.score_pairs(pairs)
    np.testing.assert_allclose(first.found["score"][:, 0], expected.scores[:2], atol=1e-5)
    assert first.found["score"].dtype == np.float32
    assert long.found["truncated"].tolist() == [[True]]
    assert long.found["tokens"].tolist() == [[512]]
    assert empty.found["score"].shape == (0, 1)
    assert "can't decode" in str(broken.error)
    assert broken.error.args[1] == TritonError.INVALID_ARG
    assert given_up.error.args[1] == TritonError.CANCELLED
    assert model.execute([]) == []
    model.finalize()


def test_a_pair_that_fails_in_the_model_fails_its_own_request(
    bundle: Path, tmp_path: Path, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_repository(bundle, tmp_path, OPTIONS, TritonOptions())[0])
    score = model._scorer.score_encoded
    poison = model._scorer.encode([("a", "poison")]).token_ids[0].tolist()

    def fail(encoded: Any) -> Any:
        for place, ids in enumerate(encoded.token_ids):
            if ids.tolist() == poison:
                raise ScoringError("the model gave nan, which is not a score", place)
        return score(encoded)

    monkeypatch.setattr(model._scorer, "score_encoded", fail)
    good, bad, other = model.execute(
        [Request([b"a", b"a"], [b"b", b"c"]), Request([b"a", b"a"], [b"d", b"poison"]), Request([b"a"], [b"e"])]
    )
    assert (good.error, other.error) == (None, None)
    assert good.found["score"].shape == (2, 1)
    assert "nan" in str(bad.error)


def test_a_bundle_that_was_changed_in_the_repository_is_not_served(bundle: Path, tmp_path: Path, triton: None) -> None:
    texts, _ = write_repository(bundle, tmp_path, OPTIONS, TritonOptions())
    model = texts / "1" / "bundle" / "onnx" / "model_quantized.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError):
        load(texts)


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


def test_texts_are_quoted() -> None:
    message = {"a": 'say "é\n"', "b": [1, 2], "c": {"d": True}}
    assert pbtxt(message) == 'a: "say \\"\\u00e9\\n\\""\nb: 1\nb: 2\nc {\n  d: true\n}\n'
