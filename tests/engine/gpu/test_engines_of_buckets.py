"""TensorRT has an engine for each bucket, and none of another model, machine or shape is used."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cappy_engine.bundle import MANIFEST, Bundle, open_bundle
from cappy_engine.errors import BundleError
from cappy_engine.session import INPUTS
from tests.support.bundles import Manifest, flip_byte, with_value
from tests.support.engines import ENGINE, kept
from tests.support.gpus import (
    BUCKETS,
    BUDGET,
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
from tests.support.installations import H100, L4

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
        pytest.param({"on": On(replace(HERE, gpus=(L4,)))}, id="another GPU"),
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


def test_an_engine_with_a_changed_byte_is_built_again(
    sealed: Bundle, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt")
    changed = Path(runtime.options[1]["trt_engine_cache_path"]).name.split(".")[0]
    flip_byte(root / changed / ENGINE, 3)
    open_faked(sealed, root, runtime, device="tensorrt")
    assert runtime.found[3:] == [[MANIFEST, ENGINE], [], [MANIFEST, ENGINE]]
    assert runtime.engines[3:] == runtime.engines[:3]
    assert f"the engine in {root / changed} is not used but built again" in caplog.text


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


KILLED = """
import json, sys, time
from pathlib import Path
from cappy_engine.bundle import open_bundle
from cappy_engine.gpu.engines import EngineCache
from cappy_engine.gpu.plan import plan_gpu
from cappy_engine.gpu.start import Machine, open_on_gpus
from cappy_engine.gpu.installation import Gpu, Installation

def open_model(model, providers):
    folder = Path(dict(providers)["TensorrtExecutionProvider"]["trt_engine_cache_path"])
    (folder / sys.argv[3]).write_text("half")
    print("building", flush=True)
    time.sleep(60)

versions, gpu, budget = json.loads(sys.argv[4])
here = Installation({}, (), "13.0", None, (Gpu(*gpu),), {}, None, {})
bundle = open_bundle(sys.argv[1])
model = plan_gpu(bundle, "tensorrt", "fp16", gpus=[0], max_batch_tokens=budget, there=here.gpus)
open_on_gpus(model, Machine(here, open_model, EngineCache(Path(sys.argv[2])), versions, {}))
"""


def test_what_a_killed_build_left_is_not_used(sealed: Bundle, root: Path) -> None:
    facts = json.dumps([VERSIONS, [H100.name, H100.compute_capability, H100.memory_bytes], BUDGET])
    command = [sys.executable, "-c", KILLED, str(sealed.path), str(root), ENGINE, facts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "building\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (left,) = kept(root)
    assert (root / left / ENGINE).read_text() == "half"
    runtime = FakeRuntime()
    open_faked(sealed, root, runtime, device="tensorrt")
    assert runtime.found == [[], [], []]
    assert left.split(".")[0] in kept(root)  # it is the engine that was asked for again
    assert left not in kept(root)
    assert all(engine.startswith(b"weights") for engine in runtime.engines)
