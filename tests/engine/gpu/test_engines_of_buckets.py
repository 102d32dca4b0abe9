"""TensorRT has an engine for each bucket, and none of another model, machine or shape is used."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from cappy_engine.bundle import MANIFEST, Bundle, open_bundle
from cappy_engine.errors import BundleError
from cappy_engine.session import INPUTS
from tests.support.bundles import Manifest, with_value
from tests.support.engines import ENGINE, kept
from tests.support.gpus import (
    BUCKETS,
    CUDA,
    HERE,
    ROWS,
    TENSORRT,
    VERSIONS,
    FakeRuntime,
    On,
    open_faked,
    write_gpu_bundle,
)
from tests.support.installations import H100

# Engines of TensorRT


def test_every_bucket_has_an_engine_of_its_own_shapes_in_the_private_cache(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt", gpus=[1])
    assert len(kept(root)) == len(runtime.opened) == len(BUCKETS)
    for (_, providers), bucket in zip(runtime.opened, BUCKETS, strict=True):
        assert [name for name, _ in providers] == [TENSORRT, CUDA]
        assert [options["device_id"] for _, options in providers] == ["1", "1"]
        options = providers[0][1]
        for end, rows in (("min", 1), ("opt", ROWS[bucket]), ("max", ROWS[bucket])):
            shapes = ",".join(f"{name}:{rows}x{bucket}" for name in INPUTS)
            assert options[f"trt_profile_{end}_shapes"] == shapes
        for name in ("trt_engine_cache_path", "trt_timing_cache_path"):
            folder = Path(options[name])
            assert folder.parent == root
            assert folder.name.split(".")[0] in kept(root)
    assert len({options["trt_engine_cache_path"] for options in runtime.options}) == len(BUCKETS)
    assert runtime.found == [[], [], []]
    assert set(runtime.modes) == {0o700}
    assert root.stat().st_mode & 0o777 == 0o700


def test_engines_are_built_once_and_found_again_wherever_the_bundle_lies(
    sealed: Bundle, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt")
    before = kept(root)
    moved = sealed.path.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        open_faked(open_bundle(moved), root, runtime, device="tensorrt")
    assert kept(root) == before
    assert runtime.found == [[], [], [], *[[MANIFEST, ENGINE]] * 3]
    assert runtime.engines[:3] == runtime.engines[3:]
    assert not caplog.records


def test_gpus_of_one_kind_share_engines(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt", gpus=[0, 1])
    assert runtime.found == [[], [], [], *[[MANIFEST, ENGINE]] * 3]


@pytest.mark.parametrize("name", ["OPTIMIZATION_LEVEL", "WORKSPACE_BYTES"])
def test_an_engine_of_other_options_is_not_used(
    sealed: Bundle, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt")
    monkeypatch.setattr(f"cappy_engine.gpu.providers.{name}", 1)
    open_faked(sealed, root, runtime, device="tensorrt")
    assert runtime.found == [[]] * 6


def test_other_weights_under_the_same_names_get_engines_of_their_own(
    sealed: Bundle, tmp_path: Path, root: Path
) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt")
    before = kept(root)
    swapped = write_gpu_bundle(tmp_path / "swapped", weights="WEIGHTS")
    open_faked(swapped, root, runtime, device="tensorrt")
    assert kept(root) > before
    assert len(kept(root)) == 6
    assert all(engine.startswith(b"weights of tensorrt") for engine in runtime.engines[:3])
    assert all(engine.startswith(b"WEIGHTS of tensorrt") for engine in runtime.engines[3:])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"on": On(replace(HERE, gpus=(replace(H100, name="NVIDIA H200"),)))}, id="another name"),
        pytest.param({"on": On(replace(HERE, gpus=(replace(H100, compute_capability="9.1"),)))}, id="another sm"),
        pytest.param({"on": On(replace(HERE, gpus=(replace(H100, memory_bytes=94 * 2**30),)))}, id="another memory"),
        pytest.param({"on": On(versions={**VERSIONS, "onnxruntime": "1.32.0"})}, id="another ONNX Runtime"),
        pytest.param({"on": On(versions={**VERSIONS, "tensorrt": "101400"})}, id="another TensorRT"),
        pytest.param({"on": On(versions={**VERSIONS, "driver": "13.1"})}, id="another driver"),
        pytest.param({"precision": "int8"}, id="another precision"),
    ],
)
def test_an_engine_of_another_machine_is_not_used(sealed: Bundle, root: Path, other: Manifest) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt")
    before = kept(root)
    open_faked(sealed, root, runtime, device="tensorrt", **other)
    assert runtime.found == [[]] * 6
    assert len(kept(root) - before) == 3
    open_faked(sealed, root, runtime, device="tensorrt")
    assert runtime.found[6:] == [[MANIFEST, ENGINE]] * 3


@pytest.mark.parametrize(
    "inputs",
    [[], "input_ids", ["a,b"], [""], ["input_ids"] * 2, ["input_ids", "pixels"], [["input_ids"]], 5, None, {}],
    ids=repr,
)
def test_a_bundle_that_does_not_name_the_inputs_is_refused_before_anything_is_opened(
    tmp_path: Path, root: Path, inputs: object
) -> None:
    change = with_value(inputs, "targets", "tensorrt", "graphs", "fp16", "inputs")
    runtime = FakeRuntime()
    with pytest.raises(BundleError, match=r"does not name the inputs of its TensorRT model .*; export it again"):
        open_faked(write_gpu_bundle(tmp_path / "bundle", change=change), root, runtime, device="tensorrt")
    assert not runtime.opened
