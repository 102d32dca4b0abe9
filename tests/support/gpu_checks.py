"""A machine for the GPU check where the CPU stands in for the GPU, below the seam; everything above is real."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
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
from cappy_engine.bundle import MANIFEST, MODEL_FILES, TARGETS, open_bundle
from cappy_engine.gpu.engines import EngineCache, engine_folder
from cappy_engine.gpu.installation import Installation
from cappy_engine.gpu.plan import GpuModel, plan_gpu
from cappy_engine.gpu.preflight import require_device
from cappy_engine.gpu.start import Machine as GpuMachine
from cappy_engine.gpu.start import open_on_gpus
from cappy_engine.session import PROVIDERS, Providers, Session, open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs
from cappy_export.proof.reference import Reference
from tests.support.bundles import read_manifest, write_manifest
from tests.support.installations import GOOD

CANARY_LENGTH = 60
"""The canary has pairs up to this length, and one of the longest."""


class OnCpu:
    """A model on the CPU that says it is elsewhere.

    Scores of middling pairs, which the canary has not, are off by `error`.
    """

    def __init__(self, model: Path, *, device: str, error: float = 0.0) -> None:
        self.device = device
        self._session = open_session(model, threads=1)
        self._error = error

    @property
    def placed(self) -> Mapping[str, Counter[str]]:
        """Say that all runs where it was asked for."""
        return {PROVIDERS[self.device]: Counter(MatMul=1)}

    def run(self, inputs: Mapping[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        lengths = inputs["attention_mask"].sum(axis=1)
        is_off = (lengths > CANARY_LENGTH) & (lengths < 512)
        scores: npt.NDArray[np.float32] = (self._session.run(inputs) + self._error * is_off).astype(np.float32)
        return scores


class CacheByName(EngineCache):
    """Takes an engine that is there, whatever it was built from, as ONNX Runtime alone does."""

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


def add_gpu_models(folder: Path, reference: Reference) -> None:
    """Give a bundle models for GPUs, which are those for the CPU, and a canary."""
    document = read_manifest(folder)
    document["targets"] = {}
    for target in ("cuda", "tensorrt"):
        (folder / target).mkdir()
        for precision, name in TARGETS[target].items():
            source = MODEL_FILES["fp32" if precision == "fp32" else "fp16"]  # int8 of random weights is too far off
            shutil.copyfile(folder / source, folder / name)
            document["files"][name] = document["files"][source]
        graph = {"unpadded": False, "inputs": ["input_ids", "attention_mask"]}
        document["targets"][target] = {
            "precisions": list(TARGETS[target]),
            "graphs": dict.fromkeys(TARGETS[target], graph),
        }
    document["targets"]["tensorrt"]["buckets"] = [64, 128, 256, 512]
    short = np.flatnonzero(reference.token_counts <= CANARY_LENGTH)[:4].tolist()
    rows = [*short, int(reference.token_counts.argmax())]
    encoded = PairTokenizer.from_file(folder / "tokenizer.json", max_length=512).encode(
        [default_pairs()[row] for row in rows]
    )
    document["canary"] = {
        "tolerance": {target: {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-3} for target in ("cuda", "tensorrt")},
        "pairs": [
            {"input_ids": ids.tolist(), "token_type_ids": types.tolist(), "score": float(reference.scores[row])}
            for row, ids, types in zip(rows, encoded.token_ids, encoded.type_ids, strict=True)
        ],
    }
    write_manifest(folder, document)


@dataclass(frozen=True)
class Ran:
    status: int
    document: dict[str, Any]
    printed: str

    def step(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(step for step in self.document["steps"] if step["name"] == name)
        return found
