"""A machine for the GPU check where the CPU stands in for the GPU, below the seam; everything above is real."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cappy_bench.gpu.check import main
from cappy_bench.gpu.host import Child, Environment, Machine, scorer_of
from cappy_bench.gpu.profile import RUNS
from cappy_engine.bundle import MANIFEST, MODEL_FILES, open_bundle
from cappy_engine.gpu.engines import EngineCache, engine_folder
from cappy_engine.gpu.installation import Installation
from cappy_engine.gpu.plan import GpuModel, plan_gpu
from cappy_engine.gpu.preflight import require_device
from cappy_engine.gpu.start import Machine as GpuMachine
from cappy_engine.gpu.start import open_on_gpus
from cappy_engine.session import PROVIDERS, Providers, Session, open_session
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.gpu_models import runnable_on_cpu
from cappy_export.proof.pairs import default_pairs
from cappy_export.proof.reference import Reference, score_with_torch
from tests.support.installations import GOOD, NO_DRIVER, changed

NO_GPU = changed(driver=None, driver_problem=NO_DRIVER, gpus=())
DEBUG_LINE = "Operator=PackedMultiHeadAttention Node=layer.0/attention DataType=fp16 SdpaKernel=FLASH_ATTENTION\n"


class OnCpu:
    """A model on the CPU that says it is elsewhere; for CUDA, with stand-ins for what the CPU lacks.

    Scores of pairs are off by `error`, but for those as long as one of the canary's, of `right_lengths`.
    """

    def __init__(self, model: Path, *, device: str, error: float = 0.0, right_lengths: Sequence[int] = ()) -> None:
        self.device = device
        with tempfile.TemporaryDirectory() as folder:
            self._session = open_session(runnable_on_cpu(model, device, Path(folder)), threads=1)
        self._error = error
        self._right_lengths = right_lengths

    @property
    def placed(self) -> Mapping[str, Counter[str]]:
        """Say that all runs where it was asked for."""
        return {PROVIDERS[self.device]: Counter(MatMul=1)}

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        is_off = ~np.isin(inputs["attention_mask"].sum(axis=1), self._right_lengths)
        scores: npt.NDArray[np.float32] = (self._session.run(inputs) + self._error * is_off).astype(np.float32)
        return scores


class CacheByName(EngineCache):
    """Takes an engine that is there, whatever it was built from, as ONNX Runtime alone does."""

    def open(self, facts: Mapping[str, object], make: Callable[[Path], Any]) -> Any:
        folder = self.root / str(facts["profile"]).replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        made = make(folder)
        (folder / MANIFEST).write_text(json.dumps({"facts": facts}))
        return made


class CacheOfHalf(EngineCache):
    """Keeps engines of fp16 alone."""

    def open(self, facts: Mapping[str, object], make: Callable[[Path], Any]) -> Any:
        if facts["precision"] == "fp16":
            return super().open(facts, make)
        with tempfile.TemporaryDirectory() as folder:
            return make(Path(folder))


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
    has_profiler: bool = True

    @property
    def machine(self) -> Machine:
        return Machine(
            self.inspect,
            lambda bundle, device, precision: scorer_of(*self.open(bundle, device, precision)),
            self.open,
            lambda model: OnCpu(model, device="cuda"),
            lambda checkpoint, precision: OnCpu(self.torch_model, device="cuda"),
            lambda checkpoint, pairs, max_length: self.reference,
            self.run_child,
            self.trace,
        )

    def inspect(self) -> Installation:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and not self.is_careless:
            return dataclasses.replace(self.installation, gpus=(), driver_problem="CUDA_ERROR_NO_DEVICE")
        return self.installation

    def open(self, bundle: Path, device: str, precision: str) -> tuple[Session, GpuModel]:
        found, installation = open_bundle(bundle), self.inspect()
        require_device(installation, device)
        there = installation.gpus
        model = plan_gpu(found, device, precision, gpus=(0,), max_batch_tokens=1024, there=there)
        if self.is_careless:
            return OnCpu(found.model("fp32"), device=device), model
        right_lengths = [len(pair["input_ids"]) for pair in found.manifest.document["canary"]["pairs"]]
        machine = GpuMachine(
            installation,
            partial(self.open_model, device, right_lengths),
            self.cache(engine_folder()),
            versions={"onnxruntime": "1.31.1"},
            environment=os.environ,
            clock=lambda: 0.0,
        )
        return open_on_gpus(model, machine), model

    def open_model(self, device: str, right_lengths: Sequence[int], model: Path, providers: Providers) -> OnCpu:
        if device == "tensorrt":
            engine = Path(providers[0][1]["trt_engine_cache_path"]) / "TensorrtExecutionProvider.engine"
            if not engine.exists():
                shutil.copyfile(model, engine)
            model = engine
        return OnCpu(model, device=device, error=self.error, right_lengths=right_lengths)

    def trace(self, run: Callable[[], object], path: Path) -> None:
        run()
        kernels = [("sm90_gemm", 3.0), ("flash_fwd_kernel", 1.0)] * RUNS if self.has_profiler else []
        events = [
            {"cat": "kernel", "name": name, "ts": 10.0 * at, "dur": dur} for at, (name, dur) in enumerate(kernels)
        ]
        path.write_text(json.dumps({"traceEvents": [*events, {"cat": "cpu_op", "name": "copy", "ts": 0, "dur": 99}]}))

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
            status = main(arguments, machine=self.machine)
            return Child(status, DEBUG_LINE if "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO" in environment else "")


@dataclass(frozen=True)
class Ran:
    status: int
    document: dict[str, Any]
    printed: str

    def step(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(step for step in self.document["steps"] if step["name"] == name)
        return found


@pytest.fixture(scope="session")
def gpu_reference(checkpoint: Path) -> Reference:
    return score_with_torch(open_checkpoint(checkpoint), default_pairs(), max_length=512)


@pytest.fixture
def gpu_check(
    checkpoint: Path,
    gpu_bundle: Path,
    gpu_reference: Reference,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Ran]:
    """Run the whole command on a fake machine; `only` these groups."""

    def run(*options: str, only: Sequence[str] = (), **fake: Any) -> Ran:
        out = tmp_path / "result.json"
        arguments = ["--checkpoint", str(checkpoint), "--bundle", str(gpu_bundle), "--work", str(tmp_path / "work")]
        groups = [argument for group in only for argument in ("--only", group)]
        machine = FakeMachine(gpu_reference, gpu_bundle / MODEL_FILES["fp16"], **fake).machine
        status = main([*arguments, "--out", str(out), "--quick", *groups, *options], machine=machine)
        printed = capsys.readouterr().out
        document = json.loads(out.read_text(encoding="utf-8"))
        assert json.loads(printed.splitlines()[-1]) == document
        return Ran(status, document, printed)

    return run
