"""The day of the GPU, rehearsed without one: the CPU stands in for it below the seam, and everything above is real."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cappy_bench.gpu.check import GROUPS, NOT_ASKED, all_steps, exit_status, main, why_not, why_unusable
from cappy_bench.gpu.drills import expect
from cappy_bench.gpu.host import Child, Environment, Machine, load_half, scorer_of
from cappy_bench.gpu.plan import CheckFailed
from cappy_bench.gpu.results import CONTESTANTS, PUBLISHED, beside_published, make_cell
from cappy_bench.gpu.throughput import time_in_turns
from cappy_engine.bundle import EMBEDDED, MANIFEST, MODEL_FILES, TARGETS, open_bundle, seal
from cappy_engine.errors import DeviceUnavailable, ScoringError
from cappy_engine.gpu.engines import EngineCache, engine_folder
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.gpu.plan import GpuModel, plan_gpu
from cappy_engine.gpu.preflight import require_device
from cappy_engine.gpu.start import Machine as GpuMachine
from cappy_engine.gpu.start import open_on_gpus
from cappy_engine.session import PROVIDERS, Providers, Session, open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import load_model, open_checkpoint
from cappy_export.proof.pairs import default_pairs
from cappy_export.proof.reference import Reference, score_with_torch
from tests.support.places import MINI, ROOT

GOOD = Installation(
    runtime_packages={"onnxruntime-gpu": "1.31.1"},
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    driver="13.0",
    driver_problem=None,
    gpus=(Gpu("NVIDIA H100", "9.0", 80 * 2**30),),
    missing_libraries={},
    onnxruntime="1.31.1",
    needed_libraries={
        "libonnxruntime_providers_cuda.so": ("libcudart.so.13",),
        "libonnxruntime_providers_tensorrt.so": ("libcudart.so.13", "libnvinfer.so.10"),
    },
)
NO_TENSORRT = dataclasses.replace(
    GOOD, missing_libraries={"libonnxruntime_providers_tensorrt.so": ("libnvinfer.so.10",)}
)
NO_GPU = dataclasses.replace(GOOD, driver=None, driver_problem="libcuda.so.1: no such file", gpus=())
CANARY_LENGTH = 60
"""The canary has pairs up to this length, and one of the longest."""
SHAPE = {"hidden_size": 8, "intermediate_size": 32, "layers": 2}


class OnCpu:
    """A model on the CPU that says it is elsewhere; scores of middling pairs, which the canary has not, are off by
    `error`."""

    def __init__(self, model: Path, *, device: str, error: float = 0.0) -> None:
        self.device = device
        self._session = open_session(model, threads=1)
        self._error = error

    @property
    def placed(self) -> Mapping[str, Counter[str]]:
        return {PROVIDERS[self.device]: Counter(MatMul=1)}

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        lengths = inputs["attention_mask"].sum(axis=1)
        is_off = (lengths > CANARY_LENGTH) & (lengths < 512)
        scores: npt.NDArray[np.float32] = (self._session.run(inputs) + self._error * is_off).astype(np.float32)
        return scores


class CacheByName(EngineCache):
    """What ONNX Runtime alone does: an engine that is there is taken, whatever it was built from."""

    def open(self, key: str, facts: Mapping[str, object], make: Callable[[Path], Any]) -> Any:
        folder = self.root / str(facts["profile"]).replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        made = make(folder)
        (folder / MANIFEST).write_text(json.dumps({"facts": facts}))
        return made


@dataclass(frozen=True)
class FakeMachine:
    """A machine with a GPU that is the CPU: our own code opens and checks, only ONNX Runtime's providers are replaced.

    An "engine" is a copy of the model, and an engine that is found is what scores. A careless machine checks nothing.
    """

    reference: Reference
    torch_model: Path
    installation: Installation = GOOD
    error: float = 0.0
    cache: type[EngineCache] = EngineCache
    is_careless: bool = False
    crashes_at: str = ""

    @property
    def machine(self) -> Machine:
        return Machine(
            self.inspect,
            lambda bundle, device, precision: scorer_of(*self.open(bundle, device, precision, False)),
            self.open,
            lambda checkpoint: OnCpu(self.torch_model, device="cuda"),
            lambda checkpoint, pairs, max_length: self.reference,
            self.run_child,
        )

    def inspect(self) -> Installation:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and not self.is_careless:
            return dataclasses.replace(self.installation, gpus=(), driver_problem="CUDA_ERROR_NO_DEVICE")
        return self.installation

    def open(self, bundle: Path, device: str, precision: str, tf32: bool) -> tuple[Session, GpuModel]:
        found, installation = open_bundle(bundle), self.inspect()
        require_device(installation, device)
        there = installation.gpus
        model = plan_gpu(found, device, precision, gpus=(0,), max_batch_tokens=1024, there=there)
        if self.is_careless:
            return OnCpu(found.model("fp32"), device=device), model
        machine = GpuMachine(
            installation,
            partial(self.open_model, device),
            self.cache(engine_folder()),
            versions={"onnxruntime": "1.31.1"},
            environment=os.environ,
            clock=lambda: 0.0,
        )
        return open_on_gpus(model, machine), model

    def open_model(self, device: str, model: Path, providers: Providers) -> OnCpu:
        if device == "tensorrt":
            engine = Path(providers[0][1]["trt_engine_cache_path"]) / "TensorrtExecutionProvider.engine"
            if not engine.exists():
                shutil.copyfile(model, engine)
            model = engine
        return OnCpu(model, device=device, error=self.error)

    def run_child(self, arguments: Sequence[str], environment: Environment, seconds: float) -> Child:
        step = arguments[-1]
        if step == self.crashes_at:
            return Child(-11, "first line\nillegal memory access\n")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            for name, value in environment.items():
                if value is None:
                    patch.delenv(name, raising=False)
                else:
                    patch.setenv(name, value)
            return Child(main(arguments, machine=self.machine), "")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return score_with_torch(open_checkpoint(checkpoint), default_pairs(), max_length=512)


@pytest.fixture(scope="module")
def gpu_bundle(bundle: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with models for GPUs, which are those for the CPU, and a canary."""
    path = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(bundle, path)
    document = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    document["targets"] = {}
    for target in ("cuda", "tensorrt"):
        (path / target).mkdir()
        for precision, name in TARGETS[target].items():
            source = MODEL_FILES["fp32" if precision == "fp32" else "fp16"]  # int8 of random weights is too far off
            shutil.copyfile(path / source, path / name)
            document["files"][name] = document["files"][source]
        graph = {"unpadded": False, "inputs": ["input_ids", "attention_mask"]}
        document["targets"][target] = {
            "precisions": list(TARGETS[target]),
            "graphs": dict.fromkeys(TARGETS[target], graph),
        }
    document["targets"]["tensorrt"]["buckets"] = [64, 128, 256, 512]
    short = np.flatnonzero(reference.token_counts <= CANARY_LENGTH)[:4].tolist()
    rows = [*short, int(reference.token_counts.argmax())]
    encoded = PairTokenizer.from_file(path / "tokenizer.json", max_length=512).encode(
        [default_pairs()[row] for row in rows]
    )
    document["canary"] = {
        "tolerance": {target: {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-3} for target in ("cuda", "tensorrt")},
        "pairs": [
            {"input_ids": ids.tolist(), "token_type_ids": types.tolist(), "score": float(reference.scores[row])}
            for row, ids, types in zip(rows, encoded.token_ids, encoded.type_ids, strict=True)
        ],
    }
    (path / MANIFEST).write_text(json.dumps(seal(document)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ran:
    status: int
    document: dict[str, Any]
    printed: str

    def step(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(step for step in self.document["steps"] if step["name"] == name)
        return found


@pytest.fixture
def check(
    checkpoint: Path,
    gpu_bundle: Path,
    reference: Reference,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ran]:
    """Run the whole command on a fake machine; `only` these groups."""

    def run(*options: str, only: Sequence[str] = (), **fake: Any) -> Ran:
        out = tmp_path / "result.json"
        arguments = ["--checkpoint", str(checkpoint), "--bundle", str(gpu_bundle), "--work", str(tmp_path / "work")]
        groups = [argument for group in only for argument in ("--only", group)]
        machine = FakeMachine(reference, gpu_bundle / MODEL_FILES["fp16"], **fake).machine
        status = main([*arguments, "--out", str(out), "--quick", *groups, *options], machine=machine)
        printed = capsys.readouterr().out
        document = json.loads(out.read_text(encoding="utf-8"))
        assert json.loads(printed.splitlines()[-1]) == document
        return Ran(status, document, printed)

    return run


@pytest.mark.slow
def test_where_all_is_well_every_step_is_ok_and_every_figure_is_there(check: Callable[..., Ran]) -> None:
    ran = check()
    assert {step["name"]: (step["status"], step["reason"]) for step in ran.document["steps"]} == {
        step["name"]: ("ok", None) for step in ran.document["steps"]
    }
    assert ran.status == 0
    assert ran.document["is_complete"]
    assert {step["name"].partition("/")[0] for step in ran.document["steps"]} == {"preflight", *GROUPS, "published"}
    for step in ran.document["steps"]:
        if step["name"].startswith("parity/") and step["name"] != "parity/reference":
            assert step["figures"]["max_error"] < 5e-3
            is_free = step["name"] in ("parity/cuda/fp32-tf32", "parity/pytorch/fp16")
            assert (step["figures"]["limits"] is None) == is_free
        for cell in (step["figures"] or {}).get("cells", ()):
            assert min(cell["pairs_per_second"], cell["tokens_per_second"], cell["tflops"]) > 0
    cells = [cell for length in (64, 512) for cell in ran.step(f"throughput/{length}")["figures"]["cells"]]
    shapes = {(cell["length"], cell["rows"]) for cell in cells}
    assert shapes == {(64, 1), (64, 8), (512, 1)}
    assert ran.step("open/tensorrt/fp16/first")["figures"]["engines_built"] == 4
    assert ran.step("open/tensorrt/fp16/again")["figures"]["engines_built"] == 0
    assert all(row["ours"] is not None for row in ran.step("published")["figures"]["rows"])
    assert "Pairs/s (TFLOP/s), medians:" in ran.printed
    assert "What is missing" not in ran.printed


def test_scores_that_the_canary_does_not_show_fail_the_parity_with_their_error(check: Callable[..., Ran]) -> None:
    ran = check(only=["parity"], error=0.25)
    step = ran.step("parity/cuda/fp32")
    assert step["status"] == "failed"
    assert step["figures"]["max_error"] == pytest.approx(0.25, abs=1e-3)
    assert "max error 0.25 is above 0.0001" in step["reason"]
    assert step["reason"] in ran.printed
    assert ran.step("parity/cuda/fp32-tf32")["status"] == "ok"  # for information
    assert ran.step("throughput/64") == {
        "name": "throughput/64", "status": "skipped", "seconds": None, "reason": NOT_ASKED, "figures": None
    }  # fmt: skip
    assert ran.status == 1


def test_drills_alone_end_in_their_errors(check: Callable[..., Ran]) -> None:
    ran = check(only=["drill"])
    assert ran.status == 0, ran.printed
    errors = {
        step["name"]: (step["figures"] or {}).get("error")
        for step in ran.document["steps"]
        if step["name"].startswith("drill/")
    }
    assert errors == {
        "drill/model-byte": "BundleError",
        "drill/wrong-canary": "DeviceUnavailable",
        "drill/hidden-gpu": "DeviceUnavailable",
        "drill/tf32-not-switched-off": "DeviceUnavailable",
        "drill/unknown-shape": "ScoringError",
        "drill/engine-byte": None,
        "drill/swapped-weights": "DeviceUnavailable",
    }


def test_a_machine_that_refuses_nothing_fails_its_drills(check: Callable[..., Ran]) -> None:
    ran = check(only=["drill"], is_careless=True)
    drills = [step for step in ran.document["steps"] if step["name"].startswith("drill/")]
    assert {step["status"] for step in drills} == {"failed"}
    assert "and nothing was raised" in ran.step("drill/hidden-gpu")["reason"]
    assert ran.status == 1


def test_engines_that_are_found_by_name_fail_their_drills(check: Callable[..., Ran]) -> None:
    ran = check(only=["drill"], cache=CacheByName)
    assert ran.step("drill/swapped-weights")["status"] == "failed"
    assert "nothing was raised" in ran.step("drill/swapped-weights")["reason"]
    assert ran.step("drill/engine-byte")["status"] == "failed"
    assert ran.step("drill/wrong-canary")["status"] == "ok"


def test_a_step_that_crashes_stops_no_other(check: Callable[..., Ran]) -> None:
    ran = check(only=["drill"], crashes_at="drill/model-byte")
    crashed = ran.step("drill/model-byte")
    assert crashed["status"] == "failed"
    assert crashed["reason"] == "its process ended with status -11: first line | illegal memory access"
    assert crashed["figures"] is None
    assert ran.step("drill/wrong-canary")["status"] == "ok"
    assert ran.status == 1


def test_without_a_gpu_all_is_skipped_with_the_reason_and_nothing_was_measured(check: Callable[..., Ran]) -> None:
    ran = check(installation=NO_GPU)
    preflight, *others = ran.document["steps"]
    assert preflight["status"] == "failed"
    assert {step["status"] for step in others} == {"skipped"}
    assert {step["reason"] for step in others} == {preflight["reason"]}
    assert "libcuda.so.1: no such file" in preflight["reason"]
    assert {(step["seconds"], step["figures"]) for step in others} == {(None, None)}
    assert "What is missing:" in ran.printed
    assert "fix: install the NVIDIA driver" in ran.printed
    assert "Pairs/s" not in ran.printed
    assert ran.status == 1


def test_without_tensorrt_what_needs_only_cuda_runs(check: Callable[..., Ran]) -> None:
    ran = check(only=["open"], installation=NO_TENSORRT)
    assert ran.step("open/cuda/fp16")["status"] == "ok"
    assert ran.step("open/tensorrt/fp16/first")["status"] == "skipped"
    assert "libnvinfer.so.10" in ran.step("open/tensorrt/fp16/first")["reason"]
    assert ran.status == 1


def test_when_the_time_is_used_up_the_rest_is_skipped_and_says_so(check: Callable[..., Ran]) -> None:
    ran = check("--max-seconds", "0", only=["drill"])
    assert ran.step("drill/model-byte")["reason"] == "the time was used up (--max-seconds)"
    assert ran.status == 1


def test_engines_that_were_kept_are_no_first_opening(check: Callable[..., Ran]) -> None:
    assert check(only=["open"]).step("open/tensorrt/fp16/first")["figures"]["opened_seconds"] > 0
    kept = check("--keep-engines", only=["open"]).step("open/tensorrt/fp16/first")
    assert kept["status"] == "ok"
    assert kept["figures"]["opened_seconds"] is None


# Decisions


def test_every_step_has_a_name_of_its_own_and_a_group_that_can_be_asked_for() -> None:
    steps = all_steps(open_bundle(EMBEDDED))
    assert len({step.name for step in steps}) == len(steps)
    assert {step.group for step in steps} == set(GROUPS)


def test_a_step_runs_only_where_nothing_is_missing_while_there_is_time() -> None:
    step = next(step for step in all_steps(open_bundle(EMBEDDED)) if step.device == "tensorrt")
    nothing = dict.fromkeys(("cuda", "tensorrt"))
    assert why_not(step, nothing, [], 1.0) is None
    assert why_not(step, nothing, [step.group], 1.0) is None
    assert why_not(step, nothing, ["drill"], 1.0) == NOT_ASKED
    assert why_not(step, {**nothing, "tensorrt": "no TensorRT"}, ["drill"], 1.0) == "no TensorRT"
    assert why_unusable(GOOD) == nothing


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [("ok", None, 0), ("skipped", NOT_ASKED, 0), ("skipped", "no time", 1), ("failed", "wrong", 1)],
)
def test_the_exit_status_is_0_only_if_all_that_was_asked_for_is_ok(
    status: str, reason: str | None, expected: int
) -> None:
    assert exit_status([{"status": "ok", "reason": None}, {"status": status, "reason": reason}]) == expected


def test_a_drill_takes_only_the_error_that_it_expects() -> None:
    def refuse() -> None:
        raise DeviceUnavailable("gives wrong scores: 3")

    assert expect(DeviceUnavailable, "wrong scores", refuse)["message"] == "gives wrong scores: 3"
    with pytest.raises(CheckFailed, match="ScoringError with '' was expected, and DeviceUnavailable came"):
        expect(ScoringError, "", refuse)
    with pytest.raises(CheckFailed, match="and DeviceUnavailable came"):
        expect(DeviceUnavailable, "no driver", refuse)
    with pytest.raises(CheckFailed, match="and nothing was raised"):
        expect(DeviceUnavailable, "", lambda: None)


def test_turns_are_reversed_and_what_cannot_run_is_named() -> None:
    ticks = iter(range(100))
    order: list[str] = []

    def break_down() -> None:
        raise MemoryError("too large")

    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": break_down}
    seconds, failed = time_in_turns(runs, runs=2, clock=lambda: float(next(ticks)))
    assert "".join(order[-4:]) == "abba"
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert failed == {"c": "MemoryError: too large"}


def test_what_did_not_run_has_no_figure_rather_than_zero() -> None:
    cell = make_cell("cuda fp16", [64] * 8, [], SHAPE)
    assert {name: value for name, value in cell.items() if value is None}.keys() == {
        "runs", "seconds", "fastest", "slowest", "pairs_per_second", "tokens_per_second", "tflops"
    }  # fmt: skip


def test_published_figures_stand_beside_ours_at_the_nearest_shape() -> None:
    cells = [
        make_cell("tensorrt fp16", [length] * rows, [rows * length * 1e-6], SHAPE)
        for length in (128, 256, 512)
        for rows in (1, 32)
    ]
    cells += [make_cell(name, [128], [], SHAPE) for name in CONTESTANTS]
    steps = [{"name": "throughput/128", "figures": {"cells": cells}}]
    found = beside_published(steps)
    assert found is not None
    ours = {(row["precision"], row["length"], row["rows"]): row["ours"] for row in found["rows"]}
    assert ours["fp16", 128, 1]["milliseconds"] == pytest.approx(0.128)
    assert (ours["fp16", 128, 128]["length"], ours["fp16", 128, 128]["rows"]) == (128, 32)
    assert ours["fp16", 384, 128]["length"] == 512  # of two as near the longer
    assert ours["int8", 128, 1] is None
    assert ours[None, None, None] is None
    assert len(found["rows"]) == len(PUBLISHED)
    assert beside_published([{"name": "throughput/128", "figures": {"cells": cells[6:]}}]) is None


# This machine


def test_pytorchs_peer_is_in_fp16_with_sdpa_and_has_the_checkpoints_weights(checkpoint: Path) -> None:
    module, loaded = load_half(checkpoint), load_model(open_checkpoint(checkpoint))
    assert module.config._attn_implementation == "sdpa"
    assert not module.training
    weights = loaded.state_dict()
    for name, weight in module.state_dict().items():
        if weight.is_floating_point():
            assert weight.dtype == torch.float16
            torch.testing.assert_close(weight, weights[name].half(), rtol=0, atol=0)


def test_the_command_on_a_machine_without_a_gpu_names_the_driver(tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("needs a machine without a CUDA driver")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "cappy_bench.gpu.check", "--checkpoint", str(MINI), "--bundle", str(EMBEDDED)]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work"), "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == document
    assert document["steps"][0]["status"] == "failed"
    assert {step["status"] for step in document["steps"][1:]} == {"skipped"}
    assert "driver: libcuda.so.1" in done.stdout
    assert "fix: install the NVIDIA driver" in done.stdout
