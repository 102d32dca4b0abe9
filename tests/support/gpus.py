"""A machine with GPUs that are not there: fake sessions, a runtime that keeps engines, and a bundle to open on them.

`write_gpu_bundle` seals a bundle with models for CUDA and TensorRT; `open_faked` opens one of its models. All but ONNX
Runtime and the driver is real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cappy_engine.batching import Batch, EncodedPairs, Ids
from cappy_engine.bundle import TARGETS, Bundle, open_bundle
from cappy_engine.errors import ScoringError
from cappy_engine.gpu.engines import EngineCache
from cappy_engine.gpu.installation import Installation
from cappy_engine.gpu.plan import GpuModel, plan_gpu
from cappy_engine.gpu.start import Machine, open_on_gpus
from cappy_engine.inputs import model_inputs
from cappy_engine.session import INPUTS, PROVIDERS, Providers, Session
from cappy_engine.testing import FakeSession, score_of
from tests.support.bundles import Change, Manifest, add_file, write_manifest
from tests.support.engines import ENGINE
from tests.support.installations import H100

CPU, CUDA, TENSORRT = (PROVIDERS[device] for device in ("cpu", "cuda", "tensorrt"))
LAYERS = Counter({"MatMul": 12, "Softmax": 2, "LayerNormalization": 5})
LONGEST, BUCKETS, BUDGET = 64, (16, 32, 64), 128
ROWS = {16: 8, 32: 4, 64: 2}
"""How many rows a batch of each bucket holds."""
HERE = Installation(
    runtime_packages={"onnxruntime-gpu": "1.31.1"},
    providers=(TENSORRT, CUDA, CPU),
    driver="13.0",
    driver_problem=None,
    gpus=(H100, H100),
    missing_libraries={},
    onnxruntime="1.31.1",
    needed_libraries={},
)
VERSIONS = {"onnxruntime": "1.31.1", "driver": "13.0", "tensorrt": "101303"}
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}
MODELS = [("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "int8")]
TOKENS = [[0, *range(5, 5 + count), 2] for count in (3, 9, 14, 25, 40, 62)]
"""The canary's pairs: of 5, 11, 16, 27, 42 and 64 tokens. Every device that is right gives their `score_of`."""

Score = Callable[[Sequence[int]], float]


def fails_on(length: int) -> Score:
    """A score, but for rows of so many tokens."""

    def score(ids: Sequence[int]) -> float:
        if len(ids) == length:
            raise ScoringError("out of GPU memory")
        return score_of(ids)

    return score


class PlacedSession(FakeSession):
    """A fake session that tells who runs its operators: its own provider, unless told otherwise."""

    def __init__(
        self, device: str, score: Score = score_of, *, placed: Mapping[str, Counter[str]] | None = None
    ) -> None:
        super().__init__(score, device=device)
        self.placed: Mapping[str, Counter[str]] = {PROVIDERS[device]: LAYERS} if placed is None else placed


class FakeRuntime:
    """Opens fake sessions, and keeps engines as ONNX Runtime does: takes the one it finds by its name, else builds it.

    An "engine" is the weights that it was built from, and the largest shapes.
    """

    def __init__(
        self, make_session: Callable[[str, int], PlacedSession] = lambda device, gpu: PlacedSession(device)
    ) -> None:
        self.opened: list[tuple[Path, list[tuple[str, Mapping[str, str]]]]] = []
        self.sessions: list[PlacedSession] = []
        self.found: list[list[str]] = []
        self.engines: list[bytes] = []
        self.modes: list[int] = []
        self.threads: int | None = None
        self._make_session = make_session

    def open(self, model: Path, providers: Providers) -> PlacedSession:
        """Open a model as `Machine.open_model` does."""
        self.opened.append((model, list(providers)))
        name, options = providers[0]
        if name == TENSORRT:
            folder = Path(options["trt_engine_cache_path"])
            self.modes.append(folder.stat().st_mode & 0o777)
            self.found.append(sorted(path.name for path in folder.iterdir()))
            if not (folder / ENGINE).exists():
                (folder / ENGINE).write_bytes(model.read_bytes() + options["trt_profile_max_shapes"].encode())
            self.engines.append((folder / ENGINE).read_bytes())
        device = next(device for device, provider in PROVIDERS.items() if provider == name)
        session = self._make_session(device, int(options["device_id"]))
        self.sessions.append(session)
        return session

    @property
    def options(self) -> list[Mapping[str, str]]:
        """List the options of the first provider of every session."""
        return [providers[0][1] for _, providers in self.opened]


@dataclass(frozen=True)
class On:
    """The machine that a test opens a model on, but for its runtime."""

    installation: Installation = HERE
    versions: Mapping[str, str] = field(default_factory=lambda: VERSIONS)
    environment: Mapping[str, str] = field(default_factory=lambda: EXACT)
    clock: Callable[[], float] = lambda: 0.0


def inputs_of(rows: Sequence[Sequence[int]], *, length: int = 0) -> dict[str, Ids]:
    """Make what a session is run with, padded to `length`."""
    token_ids = [np.array(row, dtype=np.int64) for row in rows]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    batch = Batch(np.arange(len(rows)), max(length, int(lengths.max())))
    types = [np.zeros_like(ids) for ids in token_ids]
    return model_inputs(EncodedPairs(token_ids, types, lengths, lengths < 0), batch, pad_token_id=1)


def write_gpu_bundle(folder: Path, *, weights: str = "weights", change: Change = lambda document: None) -> Bundle:
    """Seal a bundle with models for CUDA and TensorRT, as far as anyone can tell who does not open these."""
    packed, plain = {"unpadded": True}, {"unpadded": False, "inputs": list(INPUTS)}
    document: Manifest = {
        "schema_version": 1,
        "model": {"max_length": LONGEST, "pad_token_id": 1, "layers": 2, "hidden_size": 32},
        "precisions": [],
        "files": {},
        "targets": {
            target: {"precisions": list(TARGETS[target]), "graphs": {name: dict(graph) for name in TARGETS[target]}}
            for target, graph in (("cuda", packed), ("tensorrt", plain))
        },
        "canary": {
            "pairs": [{"input_ids": ids, "token_type_ids": [0] * len(ids), "score": score_of(ids)} for ids in TOKENS],
            "tolerance": {
                "cuda": {"fp32": 0.0001, "fp16": 0.001},
                "tensorrt": {"fp32": 0.0001, "fp16": 0.001, "int8": 0.05},
            },
        },
    }
    document["targets"]["tensorrt"]["buckets"] = list(BUCKETS)
    for target in ("cuda", "tensorrt"):
        for name in TARGETS[target].values():
            add_file(folder, document, name, f"{weights} of {name}".encode())
    change(document)
    write_manifest(folder, document)
    return open_bundle(folder)


def open_faked(
    bundle: Bundle,
    root: Path,
    runtime: FakeRuntime,
    *,
    device: str = "cuda",
    precision: str = "fp16",
    gpus: Sequence[int] = (0,),
    on: On = On(),
) -> Session:
    """Open a model on GPUs of the fake machine; engines are kept in `root`."""
    there = on.installation.gpus
    model = plan_gpu(bundle, device, precision, gpus=gpus, max_batch_tokens=BUDGET, there=there)
    machine = Machine(on.installation, runtime.open, EngineCache(root), on.versions, on.environment, on.clock)
    return open_on_gpus(model, machine)


def planned(bundle: Bundle, **options: Any) -> GpuModel:
    """Plan a model for two GPUs, by default in fp16 for CUDA on the first."""
    usual: dict[str, Any] = {"device": "cuda", "precision": "fp16", "gpus": (0,), "there": (H100, H100)}
    return plan_gpu(bundle, max_batch_tokens=BUDGET, **{**usual, **options})
