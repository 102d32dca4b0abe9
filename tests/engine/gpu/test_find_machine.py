"""What is looked for on this machine before a GPU is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cappy_engine.bundle import MANIFEST, Bundle
from cappy_engine.errors import DeviceUnavailable
from cappy_engine.gpu import start as gpu
from cappy_engine.gpu.installation import Installation
from cappy_engine.gpu.start import find_machine, open_on_gpus, tensorrt_version
from cappy_engine.session import PROVIDERS, Providers
from tests.support.engines import kept
from tests.support.gpus import HERE, VERSIONS, FakeRuntime, PlacedSession, planned
from tests.support.installations import H100


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """This machine as if it had GPUs: only ONNX Runtime's sessions and what is installed are replaced."""
    runtime = FakeRuntime()

    def open_session(model: Path, *, device: str, providers: Providers, threads: int | None) -> PlacedSession:
        assert PROVIDERS[device] == providers[0][0]
        runtime.threads = threads
        return runtime.open(model, providers)

    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu, "open_session", open_session)
    monkeypatch.setattr(gpu, "inspect_installation", lambda **asked: HERE)
    monkeypatch.setattr(gpu, "tensorrt_version", lambda: "101303")
    return runtime


def test_on_this_machine_the_model_is_opened(sealed: Bundle, runtime: FakeRuntime) -> None:
    session = open_on_gpus(planned(sealed, precision="fp32", gpus=[1]), find_machine("cuda", [1], threads=3))
    assert session is runtime.sessions[0]
    assert runtime.threads == 3
    assert runtime.options[0]["device_id"] == "1"


def test_on_this_machine_engines_are_kept_where_the_environment_says(
    sealed: Bundle, runtime: FakeRuntime, root: Path
) -> None:
    session = open_on_gpus(planned(sealed, device="tensorrt", precision="int8"), find_machine("tensorrt"))
    assert session.device == "tensorrt"
    (facts, *_) = [json.loads((root / name / MANIFEST).read_bytes())["facts"] for name in kept(root)]
    assert facts["versions"] == VERSIONS
    assert facts["gpu"] == asdict(H100)


@pytest.mark.usefixtures("runtime")
def test_on_this_machine_tf32_is_looked_for_in_the_environment(sealed: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planned(sealed, device="tensorrt", precision="fp32")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(DeviceUnavailable, match="NVIDIA_TF32_OVERRIDE=0"):
        open_on_gpus(model, find_machine("tensorrt"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    open_on_gpus(model, find_machine("tensorrt"))


@pytest.mark.usefixtures("runtime")
def test_only_what_the_device_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect(*, device: str) -> Installation:
        asked.append(device)
        return HERE

    asked: list[str] = []
    monkeypatch.setattr(gpu, "inspect_installation", inspect)
    for device in ("cuda", "tensorrt"):
        assert find_machine(device).installation is HERE
    assert asked == ["cuda", "tensorrt"]


def test_the_version_of_tensorrt_is_its_librarys() -> None:
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return SimpleNamespace(getInferLibVersion=lambda: 101303)

    assert tensorrt_version(load) == "101303"
    assert asked == ["libnvinfer.so.10"]


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize("load", [no_library, lambda name: SimpleNamespace()])
def test_a_tensorrt_that_does_not_tell_its_version_is_refused(load: Callable[[str], Any]) -> None:
    with pytest.raises(DeviceUnavailable, match=r"TensorRT does not tell its version .*cappy doctor"):
        tensorrt_version(load)
