"""Where CUDA works, auto takes it; where a GPU was asked for by name, nothing falls back. All on fake GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import TARGETS
from cappy_engine.errors import BundleError, DeviceUnavailable, PrecisionUnavailable, ScoringError
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.gpu.plan import GpuModel
from cappy_engine.options import Device, Precision
from cappy_engine.testing import FakeSession, score_of
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import (
    copy_bundle,
    keep_targets,
    read_manifest,
    remove_file,
    write_manifest,
)
from tests.support.installations import PretendsToHaveGpus, needs_cpu_package
from tests.support.places import parity_pairs

FEW = parity_pairs()[::6]


class FakeGpus:
    """Four GPUs on which fake sessions open, or `error` is raised; remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, tuple[int, ...], int]] = []
        self.sessions: list[FakeSession] = []
        self.error: Exception | None = None
        self.threads: int | None = None
        self.there = (Gpu("some GPU", "9.0", 2**30),) * 4

    def find_machine(self, device: str, gpus: Sequence[int] = (0,), *, threads: int | None = None) -> SimpleNamespace:
        self.threads = threads
        return SimpleNamespace(installation=Installation({}, (), "13.0", None, self.there, {}, None, {}))

    def open_on_gpus(self, model: GpuModel, machine: SimpleNamespace) -> FakeSession:
        self.asked.append((model.device, model.precision, model.gpus, model.grouping.max_batch_tokens))
        if self.error is not None:
            raise self.error
        self.sessions.append(FakeSession())
        return self.sessions[-1]


@pytest.fixture
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    gpus = FakeGpus()
    monkeypatch.setattr("cappy_engine.opening.load_runtime", PretendsToHaveGpus)
    monkeypatch.setattr("cappy_engine.opening.find_machine", gpus.find_machine)
    monkeypatch.setattr("cappy_engine.opening.open_on_gpus", gpus.open_on_gpus)
    return gpus


@pytest.fixture
def gpu_bundle(tmp_path: Path) -> Path:
    """Give a bundle without fp32 for CUDA, with its own buckets, and with errors that make all candidates near."""
    folder = copy_bundle(tmp_path / "gpu")
    document = read_manifest(folder)
    document["targets"]["cuda"]["precisions"] = ["fp16"]
    document["targets"]["tensorrt"]["buckets"] = [16, 64, 512]
    document["canary"]["tolerance"]["tensorrt"]["int8"] = 1e9
    remove_file(folder, document, TARGETS["cuda"]["fp32"])
    write_manifest(folder, document)
    return folder


@pytest.fixture
def cpu_bundle(tmp_path: Path) -> Path:
    """Give a bundle without models for GPUs."""
    return keep_targets(copy_bundle(tmp_path / "cpu"), "cpu")


def test_auto_takes_cuda_where_it_works(gpu_bundle: Path, fake_gpus: FakeGpus, tokenizer: PairTokenizer) -> None:
    with Scorer.open(gpu_bundle) as opened:
        info = opened.info
        scores = opened.score(FEW)
    assert fake_gpus.asked == [("cuda", "fp16", (0,), 16_384)]
    assert (info.device, info.device_reason) == ("cuda", "auto: CUDA works here")
    assert (info.precision, info.precision_reason) == ("fp16", "auto: the first of fp32, fp16 in the bundle")
    assert (info.mode, info.mode_reason) == ("latency", "one session")
    assert (info.padding, info.max_batch_tokens, info.gpus, info.buckets) == ("allowed", 16_384, (0,), ())
    assert all(batch["input_ids"].size <= 16_384 for batch in fake_gpus.sessions[0].batches)
    assert scores.tolist() == [np.float32(score_of(ids.tolist())) for ids in tokenizer.encode(FEW).token_ids]


def test_tensorrt_runs_in_buckets_on_all_of_the_gpus(
    gpu_bundle: Path, fake_gpus: FakeGpus, tokenizer: PairTokenizer
) -> None:
    with Scorer.open(gpu_bundle, device="tensorrt", gpus=[2, 0], max_batch_tokens=1024, threads=3) as opened:
        info = opened.info
        scores = opened.score_pairs(FEW, max_batch_tokens=100_000, padding="allowed").scores
    assert fake_gpus.asked == [("tensorrt", "fp32", (2, 0), 1024)]
    assert (info.device, info.device_reason) == ("tensorrt", "asked for")
    assert info.mode_reason == "one session on each of 2 GPUs"
    assert (fake_gpus.threads, info.threads) == (3, 3)
    assert (info.padding, info.gpus, info.buckets) == ("avoided", (2, 0), (16, 64, 512))
    shapes = {batch["input_ids"].shape for batch in fake_gpus.sessions[0].batches}
    assert {length for _, length in shapes} <= {16, 64, 512}
    assert all(rows * length <= 1024 for rows, length in shapes)
    assert scores.tolist() == [np.float32(score_of(ids.tolist())) for ids in tokenizer.encode(FEW).token_ids]


def test_auto_passes_over_a_gpu_that_cannot_be_used_and_says_why(
    gpu_bundle: Path, fake_gpus: FakeGpus, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpus.error = DeviceUnavailable("device 'cuda' gives wrong scores:\n    0.5")
    with Scorer.open(gpu_bundle, device="auto") as opened:
        assert (opened.info.device, opened.info.precision, opened.info.gpus) == ("cpu", "fp32", ())
        assert opened.info.device_reason == "auto: device 'cuda' gives wrong scores: 0.5"
    assert "using the CPU, since device 'cuda' gives wrong scores" in caplog.text
    for device, precision in (("cuda", "fp16"), ("tensorrt", "fp32")):
        with pytest.raises(DeviceUnavailable, match="gives wrong scores"):
            Scorer.open(gpu_bundle, device=cast(Device, device), precision=cast(Precision, precision))


def test_auto_takes_the_cpu_where_the_bundle_has_no_model_for_cuda(
    cpu_bundle: Path, gpu_bundle: Path, fake_gpus: FakeGpus
) -> None:
    for path, precision, reason in (
        (cpu_bundle, "auto", "the bundle has no model for cuda; export it with --target cuda"),
        (gpu_bundle, "fp32", "has no fp32 model for cuda, only fp16; export it with --precision fp32 --target cuda"),
        (gpu_bundle, "int8", "int8 does not run on cuda, which runs fp32, fp16"),
    ):
        with Scorer.open(path, precision=cast(Precision, precision)) as opened:
            assert opened.info.device == "cpu"
            assert opened.info.device_reason.startswith("auto: ")
            assert opened.info.device_reason.endswith(reason)
    with pytest.raises(PrecisionUnavailable, match="no model for cuda; export it with --target cuda"):
        Scorer.open(cpu_bundle, device="cuda")
    assert not fake_gpus.sessions


def test_auto_does_not_hide_that_the_bundle_or_a_run_is_at_fault(gpu_bundle: Path, fake_gpus: FakeGpus) -> None:
    for error in (BundleError("cuda/model_fp16.onnx is not the file that was exported"), ScoringError("out of memory")):
        fake_gpus.error = error
        with pytest.raises(type(error), match=str(error)):
            Scorer.open(gpu_bundle)


def test_an_exact_winner_is_found_on_the_same_gpus(gpu_bundle: Path, fake_gpus: FakeGpus) -> None:
    candidates = ["A pear", "granite", "ocean"]
    with Scorer.open(gpu_bundle, device="tensorrt", precision="int8", gpus=[1], max_batch_tokens=600) as opened:
        ranked = opened.rank("Name a fruit.", candidates, exact_winner=True)
    assert fake_gpus.asked == [("tensorrt", "int8", (1,), 600), ("tensorrt", "fp32", (1,), 600)]
    assert all(candidate.is_exact for candidate in ranked)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
@needs_cpu_package
def test_a_gpu_asked_for_by_name_does_not_fall_back(cpu_bundle: Path, gpu_bundle: Path, device: Device) -> None:
    provider = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[device]
    for path in (cpu_bundle, gpu_bundle):  # that there is no device comes before that there is no model
        with pytest.raises(DeviceUnavailable, match=f"(?s)device '{device}' cannot be used here:.* no {provider}: "):
            Scorer.open(path, device=device)


def test_cuda_that_is_listed_but_has_no_driver_is_refused_by_name_and_passed_over_by_auto(
    gpu_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    providers = tuple(PretendsToHaveGpus().get_available_providers())
    without_driver = Installation({"onnxruntime-gpu": "9.9"}, providers, None, "no libcuda.so.1", (), {}, "9.9", {})
    for module in ("gpu.start", "opening"):
        monkeypatch.setattr(f"cappy_engine.{module}.load_runtime", PretendsToHaveGpus)
    monkeypatch.setattr("cappy_engine.gpu.start.inspect_installation", lambda **asked: without_driver)
    with pytest.raises(DeviceUnavailable, match=r"device 'cuda' cannot be used here:\n  driver: no libcuda\.so\.1\n"):
        Scorer.open(gpu_bundle, device="cuda")
    with Scorer.open(gpu_bundle, device="auto") as opened:
        assert opened.info.device == "cpu"
        assert opened.info.device_reason.startswith("auto: device 'cuda' cannot be used here: driver: no libcuda.so.1")
        assert "\n" not in opened.info.device_reason
    assert "using the CPU, since device 'cuda' cannot be used here" in caplog.text
