"""The model of texts in Triton's repository answers each request for itself, and only if its scores are right."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import BundleError, DeviceUnavailable, ModelBroken, ScoringError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.triton import TritonOptions, write_repository

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


def load(folder: Path, kind: str = "CPU", number: int = 0) -> Any:
    """Load model.py as Triton does, by its path."""
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps({"parameters": parameters(folder)}),
            "model_instance_kind": kind,
            "model_instance_device_id": str(number),
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    return model


def parameters(folder: Path) -> dict[str, dict[str, str]]:
    """Read the parameters of config.pbtxt, as Triton hands them to a model."""
    found = re.findall(r'key: (".*")\n +value {\n +string_value: (".*")', (folder / "config.pbtxt").read_text())
    return {json.loads(key): {"string_value": json.loads(text)} for key, text in found}


def test_requests_that_triton_batches_are_answered_each_for_itself(bundle: Path, tmp_path: Path, triton: None) -> None:
    model = load(write_repository(bundle, tmp_path, OPTIONS, TritonOptions())[0])
    requests = [
        Request([b"Is the sky blue?"] * 2, [b"Yes", "Où? 日本".encode()]),
        Request([b"Is it?"], [b"\xff"]),
        Request([b"Is it?"], [b"no"], is_given_up=True),
        Request([b"Is it?"], [b"word " * 700]),
        Request([], []),
        Request([b"Is it?"], [b"Yes"]),
    ]
    first, broken, given_up, long, empty, last = model.execute(requests)
    with Scorer.open_with(bundle, OPTIONS) as scorer:
        expected = scorer.score_pairs(
            [
                ("Is the sky blue?", "Yes"), ("Is the sky blue?", "Où? 日本"), ("Is it?", "word " * 700),
                ("Is it?", "Yes"),
            ]
        )  # fmt: skip
    answered = [first, long, last]
    for name, values, kind in (
        ("score", expected.scores, np.float32),
        ("tokens", expected.token_counts, np.int32),
        ("truncated", expected.truncated, np.bool_),
    ):
        found = [each.found[name] for each in answered]
        assert [(each.shape, each.dtype) for each in found] == [((count, 1), kind) for count in (2, 1, 1)]
        np.testing.assert_allclose(np.concatenate(found)[:, 0], values, atol=1e-5)
    assert expected.truncated.tolist() == [False, False, True, False]
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
    requests = [Request([b"a", b"a"], [b"b", b"c"]), Request([b"a", b"a"], [b"d", b"poison"]), Request([b"a"], [b"e"])]
    good, bad, other = model.execute(requests)
    assert (good.error, other.error) == (None, None)
    expected = [score(model._scorer.encode([("a", text)])).scores[0] for text in "bce"]
    np.testing.assert_allclose([*good.found["score"][:, 0], *other.found["score"][:, 0]], expected, atol=1e-5)
    assert "nan" in str(bad.error)
    assert bad.error.args[1] == TritonError.INTERNAL

    def fail_all(encoded: Any) -> Any:
        raise ScoringError("no memory")

    monkeypatch.setattr(model._scorer, "score_encoded", fail_all)
    assert [str(each.error.args[0]) for each in model.execute(requests)] == ["no memory"] * 3


def test_a_pair_that_is_too_long_is_refused_where_that_was_asked(bundle: Path, tmp_path: Path, triton: None) -> None:
    model = load(write_repository(bundle, tmp_path, OPTIONS, TritonOptions(too_long="refuse"))[0])
    long, good = model.execute([Request([b"Is it?"], [b"word " * 700]), Request([b"Is it?"], [b"Yes"])])
    assert "the model takes 512" in str(long.error)
    assert (long.error.args[1], good.error) == (TritonError.INVALID_ARG, None)


def test_a_model_whose_scores_are_off_is_not_served(
    bundle: Path, tmp_path: Path, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, _ = write_repository(bundle, tmp_path, OPTIONS, TritonOptions())
    run = Dispatcher.run
    monkeypatch.setattr(Dispatcher, "run", lambda dispatcher, encoded: run(dispatcher, encoded) + np.float32(0.5))
    with pytest.raises(ModelBroken, match="wrong scores"):
        load(texts)


def test_a_bundle_that_was_changed_in_the_repository_is_not_served(bundle: Path, tmp_path: Path, triton: None) -> None:
    texts, _ = write_repository(bundle, tmp_path, OPTIONS, TritonOptions())
    model = texts / "1" / "bundle" / "onnx" / "model_quantized.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError):
        load(texts)


def test_an_instance_for_a_gpu_opens_the_model_on_that_one(
    bundle: Path, tmp_path: Path, triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, _ = write_repository(bundle, tmp_path, ScorerOptions(device="cuda", gpus=(1, 3)), TritonOptions())
    asked: list[ScorerOptions] = []

    def open_with(bundle: Path, options: ScorerOptions) -> Scorer:
        asked.append(options)
        raise DeviceUnavailable("no GPU here")

    monkeypatch.setattr(Scorer, "open_with", open_with)
    with pytest.raises(DeviceUnavailable):
        load(texts, "GPU", 3)
    assert (asked[0].device, asked[0].gpus) == ("cuda", (3,))
