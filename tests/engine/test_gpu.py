"""A GPU serves only after it was proven. All on fakes, since the machines that run these tests have no GPU."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.batching import Batch, EncodedPairs, Grouping, Ids, Padding, model_inputs
from cappy_engine.bundle import EMBEDDED, MANIFEST, TARGETS, Bundle, open_bundle, seal
from cappy_engine.errors import BundleError, DeviceUnavailable, PrecisionUnavailable, ScoringError
from cappy_engine.gpu import start as gpu
from cappy_engine.gpu.canary import check_canary, read_canary
from cappy_engine.gpu.engines import EngineCache
from cappy_engine.gpu.installation import Gpu, Installation
from cappy_engine.gpu.plan import GpuModel, batch_flops, canary_batches, full_batch, plan_gpu
from cappy_engine.gpu.sessions import BucketedSession, SharedSession
from cappy_engine.gpu.start import Machine, find_machine, open_on_gpus, tensorrt_version
from cappy_engine.runner import Runner
from cappy_engine.scorer import Scorer
from cappy_engine.session import INPUTS, PROVIDERS, Inputs, Providers, Session
from cappy_engine.tokenizer import PairTokenizer

CPU, CUDA, TENSORRT = (PROVIDERS[device] for device in ("cpu", "cuda", "tensorrt"))
LAYERS = Counter({"MatMul": 12, "Softmax": 2, "LayerNormalization": 5})
LONGEST, BUCKETS, BUDGET = 64, (16, 32, 64), 128
ROWS = {16: 8, 32: 4, 64: 2}
"""How many rows a batch of each bucket holds."""
ENGINE = "model_sm90.engine"
H100, L4 = Gpu("NVIDIA H100", "9.0", 80 * 2**30), Gpu("NVIDIA L4", "8.9", 23 * 2**30)
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
"""The canary's pairs: of 5, 11, 16, 27, 42 and 64 tokens."""
MIDDLE = 27


def score_of(ids: Sequence[int]) -> float:
    """What every device that is right gives for these tokens."""
    return sum(ids) % 97 / 97


class FakeSession:
    """Scores a row by its real tokens, and remembers every batch; its own provider runs all, unless told otherwise."""

    def __init__(
        self,
        device: str,
        score: Callable[[Sequence[int]], float] = score_of,
        *,
        placed: Mapping[str, Counter[str]] | None = None,
    ) -> None:
        self.device = device
        self.placed: Mapping[str, Counter[str]] = {PROVIDERS[device]: LAYERS} if placed is None else placed
        self.batches: list[Inputs] = []
        self._score = score

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        self.batches.append(inputs)
        return np.array([self._score(row) for row in real_tokens(inputs)], dtype=np.float32)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [batch["input_ids"].shape for batch in self.batches]


class FakeRuntime:
    """Opens fake sessions, and keeps engines as ONNX Runtime does: takes the one it finds by its name, else builds it.

    An "engine" is the weights that it was built from, and the largest shapes.
    """

    def __init__(
        self, make_session: Callable[[str, int], FakeSession] = lambda device, gpu: FakeSession(device)
    ) -> None:
        self.opened: list[tuple[Path, list[tuple[str, Mapping[str, str]]]]] = []
        self.sessions: list[FakeSession] = []
        self.found: list[list[str]] = []
        self.engines: list[bytes] = []
        self.modes: list[int] = []
        self._make_session = make_session

    def open(self, model: Path, providers: Providers) -> FakeSession:
        self.opened.append((model, list(providers)))
        name, options = providers[0]
        if name == TENSORRT:
            folder = Path(options["trt_engine_cache_path"])
            self.modes.append(folder.stat().st_mode & 0o777)
            self.found.append(sorted(path.name for path in folder.iterdir()))
            if not (folder / ENGINE).exists():
                (folder / ENGINE).write_bytes(engine_of(model, options["trt_profile_max_shapes"]))
            self.engines.append((folder / ENGINE).read_bytes())
        device = next(device for device, provider in PROVIDERS.items() if provider == name)
        session = self._make_session(device, int(options["device_id"]))
        self.sessions.append(session)
        return session

    @property
    def options(self) -> list[Mapping[str, str]]:
        """Of the first provider of every session."""
        return [providers[0][1] for _, providers in self.opened]


def engine_of(model: Path, shapes: str) -> bytes:
    return model.read_bytes() + shapes.encode()


def real_tokens(inputs: Inputs) -> list[list[int]]:
    """The rows without padding."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask in rows]


def inputs_of(rows: Sequence[Sequence[int]], *, length: int = 0) -> dict[str, npt.NDArray[np.int64]]:
    """What a session is run with, padded to `length`."""
    token_ids = [np.array(row, dtype=np.int64) for row in rows]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    batch = Batch(np.arange(len(rows)), max(length, int(lengths.max())))
    types = [np.zeros_like(ids) for ids in token_ids]
    return model_inputs(EncodedPairs(token_ids, types, lengths, lengths < 0), batch, pad_token_id=1)


def write_bundle(
    folder: Path, *, weights: str = "weights", change: Callable[[dict[str, Any]], object] = lambda document: None
) -> Bundle:
    """A sealed bundle with models for CUDA and TensorRT, as far as anyone can tell who does not open these."""
    files = {}
    for target in ("cuda", "tensorrt"):
        for name in TARGETS[target].values():
            content = f"{weights} of {name}".encode()
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    packed, plain = {"unpadded": True}, {"unpadded": False, "inputs": list(INPUTS)}
    document: dict[str, Any] = {
        "schema_version": 1,
        "model": {"max_length": LONGEST, "pad_token_id": 1, "layers": 2, "hidden_size": 32},
        "precisions": [],
        "files": files,
        "targets": {
            "cuda": {
                "precisions": list(TARGETS["cuda"]),
                "graphs": {name: dict(packed) for name in TARGETS["cuda"]},
            },
            "tensorrt": {
                "precisions": list(TARGETS["tensorrt"]),
                "graphs": {name: dict(plain) for name in TARGETS["tensorrt"]},
                "buckets": list(BUCKETS),
            },
        },
        "canary": {
            "pairs": [{"input_ids": ids, "token_type_ids": [0] * len(ids), "score": score_of(ids)} for ids in TOKENS],
            "tolerance": {
                "cuda": {"fp32": 0.0001, "fp16": 0.001},
                "tensorrt": {"fp32": 0.0001, "fp16": 0.001, "int8": 0.05},
            },
        },
    }
    change(document)
    (folder / MANIFEST).write_text(json.dumps(seal(document)), encoding="utf-8")
    return open_bundle(folder)


@dataclass(frozen=True)
class On:
    """The machine that a test opens a model on, but for its runtime."""

    installation: Installation = HERE
    versions: Mapping[str, str] = field(default_factory=lambda: VERSIONS)
    environment: Mapping[str, str] = field(default_factory=lambda: EXACT)
    clock: Callable[[], float] = lambda: 0.0


def opened(
    bundle: Bundle,
    root: Path,
    runtime: FakeRuntime,
    *,
    device: str = "cuda",
    precision: str = "fp16",
    gpus: Sequence[int] = (0,),
    on: On = On(),
) -> Session:
    there = on.installation.gpus
    model = plan_gpu(bundle, device, precision, gpus=gpus, max_batch_tokens=BUDGET, there=there)
    machine = Machine(on.installation, runtime.open, EngineCache(root), on.versions, on.environment, on.clock)
    return open_on_gpus(model, machine)


def kept(root: Path) -> set[str]:
    """The names of all that the engines' folder holds but for the locks."""
    return {path.name for path in root.iterdir() if path.suffix != ".lock"}


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.fixture
def sealed(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where engines are kept."""
    return tmp_path / "cache" / "engines"


@pytest.fixture(scope="module")
def tokenizer() -> PairTokenizer:
    return PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=LONGEST)


# What opens


@pytest.mark.parametrize(("device", "precision"), MODELS)
def test_a_device_that_is_right_opens_and_scores(sealed: Bundle, root: Path, device: str, precision: str) -> None:
    runtime = FakeRuntime()
    session = opened(sealed, root, runtime, device=device, precision=precision)
    assert session.device == device
    assert {model for model, _ in runtime.opened} == {sealed.path / TARGETS[device][precision]}
    rows = [[0, 7, 9, 2], [0, 8, 2]]
    np.testing.assert_allclose(session.run(inputs_of(rows, length=16)), [score_of(row) for row in rows], atol=1e-6)


@pytest.mark.parametrize(("device", "precision"), MODELS)
def test_the_canary_is_run_in_the_batches_of_the_scorer_after_a_full_batch_twice(
    sealed: Bundle, root: Path, tokenizer: PairTokenizer, device: str, precision: str
) -> None:
    runtime = FakeRuntime()
    opened(sealed, root, runtime, device=device, precision=precision)
    model = plan_gpu(sealed, device, precision, gpus=[0], max_batch_tokens=BUDGET, there=[H100])
    runner = Runner(FakeSession(device), model.grouping, pad_token_id=1)
    expected = [(len(batch.rows), batch.length) for batch in runner.plan(np.array(list(map(len, TOKENS)))).batches]
    assert len(expected) > 1
    if device == "cuda":
        (session,) = runtime.sessions
        assert session.shapes == [(2, 64), (2, 64), *expected]
    else:
        for session, bucket in zip(runtime.sessions, BUCKETS, strict=True):
            full = (ROWS[bucket], bucket)
            fitting = sum(len(tokens) <= bucket for tokens in TOKENS)  # each engine scores all that it can take
            most = ROWS[bucket]
            canary = [(min(most, fitting - start), bucket) for start in range(0, fitting, most)]
            assert session.shapes == [full, full, *canary]
    full_batches = [batch for session in runtime.sessions for batch in session.batches[:2]]
    assert all(batch["attention_mask"].all() for batch in full_batches)
    rows = [row for session in runtime.sessions for batch in session.batches[2:] for row in real_tokens(batch)]
    buckets = (LONGEST,) if device == "cuda" else BUCKETS
    assert sorted(rows) == sorted(tokens for bucket in buckets for tokens in TOKENS if len(tokens) <= bucket)
    assert all(set(batch) == set(INPUTS) for session in runtime.sessions for batch in session.batches)


def test_a_device_may_be_off_by_as_much_as_was_measured_at_the_export(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime(lambda device, gpu: FakeSession(device, lambda ids: score_of(ids) + 0.0009))
    opened(sealed, root, runtime, precision="fp16")
    with pytest.raises(DeviceUnavailable, match=r"0\.0001 is allowed"):
        opened(sealed, root, runtime, precision="fp32")


def test_a_full_batch_is_of_real_tokens_that_every_model_has() -> None:
    for pad_token_id, token in ((1, 0), (0, 1), (5, 0)):
        inputs = full_batch(3, 4, pad_token_id=pad_token_id)
        assert set(inputs) == set(INPUTS)
        assert all(values.shape == (3, 4) and values.dtype == np.int64 for values in inputs.values())
        assert (inputs["input_ids"] == token).all()
        assert inputs["attention_mask"].all()
        assert inputs["position_ids"].tolist() == [[pad_token_id + place for place in (1, 2, 3, 4)]] * 3


# What is refused


WRONG: dict[str, tuple[Callable[[Sequence[int]], float], str]] = {
    "one score off": (
        lambda ids: score_of(ids) + 0.003 * (len(ids) == MIDDLE),  # by mean, all would be well
        r"0\.40506 for a pair .* whose score is 0\.40206, and 0\.001 is allowed",
    ),
    "no number": (
        lambda ids: float("nan") if len(ids) == MIDDLE else score_of(ids),
        r"nan for a pair .* whose score is 0\.40206, and 0\.001 is allowed",
    ),
    "infinite": (
        lambda ids: float("inf") if len(ids) == MIDDLE else score_of(ids),
        r"inf for a pair .* is 0\.40206, .* allowed",
    ),
    "all the same": (lambda ids: 0.5, r"0\.50000 for a pair .* whose score is 0\.\d{5}, and 0\.001 is allowed"),
}


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_score_of_the_canary_stops_the_start(sealed: Bundle, root: Path, device: str, wrong: str) -> None:
    score, problem = WRONG[wrong]
    runtime = FakeRuntime(lambda device, gpu: FakeSession(device, score))
    with pytest.raises(
        DeviceUnavailable, match=f"device '{device}' gives wrong scores: {problem}, at .*; nothing was scored"
    ):
        opened(sealed, root, runtime, device=device)


def test_a_wrong_engine_of_a_bucket_that_no_pair_of_the_canary_needs_stops_the_start(
    tmp_path: Path, root: Path
) -> None:
    def change(document: dict[str, Any]) -> None:  # as an export leaves it: short pairs, and the longest
        pairs = document["canary"]["pairs"]
        ends = [pair for pair in pairs if len(pair["input_ids"]) <= BUCKETS[0] or len(pair["input_ids"]) == LONGEST]
        document["canary"]["pairs"] = ends

    bundle, opens = write_bundle(tmp_path / "bundle", change=change), count()

    def make(device: str, gpu: int) -> FakeSession:
        return FakeSession(device, (lambda ids: 0.5) if next(opens) == 1 else score_of)

    with pytest.raises(DeviceUnavailable, match=rf"gives wrong scores: 0\.50000 .* x {BUCKETS[1]} tokens"):
        opened(bundle, root, FakeRuntime(make), device="tensorrt")


def test_one_wrong_gpu_of_two_stops_the_start(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime(lambda device, gpu: FakeSession(device, score_of if gpu == 0 else lambda ids: 0.5))
    with pytest.raises(DeviceUnavailable, match="gives wrong scores"):
        opened(sealed, root, runtime, gpus=[0, 1])
    assert len(runtime.opened) == 2


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda document: document.pop("canary"), id="none at all"),
        pytest.param(lambda document: document["canary"].pop("pairs"), id="no pairs"),
        pytest.param(lambda document: document["canary"].pop("tolerance"), id="no tolerances"),
        pytest.param(lambda document: document["canary"]["tolerance"].clear(), id="none for the device"),
        pytest.param(
            lambda document: [found.pop("fp16") for found in document["canary"]["tolerance"].values()],
            id="none for the precision",
        ),
        pytest.param(lambda document: document["canary"]["pairs"][2].pop("score"), id="a pair without score"),
        pytest.param(lambda document: document["canary"].update(pairs=[[1, 2]]), id="no pairs but numbers"),
    ],
)
def test_a_bundle_that_cannot_prove_this_model_is_refused(
    tmp_path: Path, root: Path, device: str, change: Callable[[dict[str, Any]], object]
) -> None:
    runtime = FakeRuntime()
    problem = f"no canary for fp16 on {device} .*export it again with --target {device}"
    with pytest.raises(BundleError, match=problem):
        opened(write_bundle(tmp_path / "bundle", change=change), root, runtime, device=device)
    assert not runtime.opened


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda canary: canary["pairs"].clear(), id="no pair"),
        pytest.param(lambda canary: canary["tolerance"]["cuda"].update(fp16=0), id="a tolerance of 0"),
        pytest.param(lambda canary: canary["tolerance"]["cuda"].update(fp16=-1), id="a negative tolerance"),
        pytest.param(lambda canary: canary["tolerance"]["cuda"].update(fp16="nan"), id="a tolerance that is none"),
        pytest.param(lambda canary: canary["pairs"][0].update(score="nan"), id="a score that is none"),
    ],
)
def test_a_canary_that_proves_nothing_is_refused(
    tmp_path: Path, root: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    bundle = write_bundle(tmp_path / "bundle", change=lambda document: change(document["canary"]))
    with pytest.raises(BundleError, match="canary for fp16 on cuda is empty or not a number; export it again"):
        opened(bundle, root, FakeRuntime())


def test_a_score_of_the_canary_that_was_not_computed_is_no_score(sealed: Bundle) -> None:
    canary = read_canary(sealed.manifest.document, "cuda", "fp16")
    batches = [Batch(np.array([0, 1]), 11)]
    with pytest.raises(DeviceUnavailable, match="4 of 6 pairs of the canary were not scored on 'cuda'"):
        check_canary(FakeSession("cuda"), canary, batches, pad_token_id=1)


@pytest.mark.parametrize(
    ("device", "placed", "problem"),
    [
        ("cuda", {CPU: LAYERS}, "CPUExecutionProvider runs 12 MatMul"),
        ("cuda", {CUDA: LAYERS, CPU: Counter({"MatMul": 1})}, "CPUExecutionProvider runs 1 MatMul"),
        ("tensorrt", {TENSORRT: LAYERS, CUDA: Counter({"Gelu": 2})}, "CUDAExecutionProvider runs 2 Gelu"),
        ("tensorrt", {TENSORRT: LAYERS, CPU: LAYERS}, "CPUExecutionProvider runs 12 MatMul"),
        ("tensorrt", {}, "no node at all"),
    ],
)
def test_a_session_whose_work_is_done_elsewhere_is_refused_before_it_runs(
    sealed: Bundle, root: Path, device: str, placed: Mapping[str, Counter[str]], problem: str
) -> None:
    runtime = FakeRuntime(lambda device, gpu: FakeSession(device, placed=placed))
    with pytest.raises(DeviceUnavailable, match=problem):
        opened(sealed, root, runtime, device=device)
    assert [session.batches for session in runtime.sessions] == [[]]


class Clock:
    """Stands still but for what a session adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedSession(FakeSession):
    """Its first run takes `first` seconds, and all others `later`."""

    def __init__(self, device: str, clock: Clock, *, first: float, later: float) -> None:
        super().__init__(device)
        self._clock = clock
        self._first, self._later = first, later

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        self._clock.now += self._later if self.batches else self._first
        return super().run(inputs)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_slower_than_any_gpu_opens_with_a_warning(
    quick: Bundle, root: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    flops = batch_flops(quick.manifest.document["model"], 2, 64)
    clock = Clock()
    fast = FakeRuntime(lambda device, gpu: TimedSession(device, clock, first=100.0, later=flops / 2e12))
    opened(quick, root, fast, device=device, on=On(clock=clock))  # the first run loads kernels, and counts nothing
    assert not caplog.records
    slow = FakeRuntime(lambda device, gpu: TimedSession(device, clock, first=0.0, later=flops / 2.5e11))
    opened(quick, root, slow, device=device, on=On(clock=clock))
    assert "computes 0.250 TFLOP/s on a full batch" in caplog.text


def test_the_operations_of_a_batch_are_two_for_each_weight_and_token() -> None:
    layer = 4 * 1024**2 + 2 * 4 * 1024**2  # attention's four matrices, and two of the feed-forward
    assert batch_flops({"layers": 24, "hidden_size": 1024}, 3, 512) == 2 * 24 * layer * 3 * 512


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_changed_model_file_is_refused_before_anything_is_opened(sealed: Bundle, root: Path, device: str) -> None:
    name = TARGETS[device]["fp16"]
    flip_byte(sealed.path / name)
    runtime = FakeRuntime()
    with pytest.raises(BundleError, match=f"{name} .* is not the file that was exported"):
        opened(sealed, root, runtime, device=device)
    assert not runtime.opened
    opened(sealed, root, runtime, device=device, precision="fp32")


@pytest.mark.parametrize("environment", [{}, {"NVIDIA_TF32_OVERRIDE": "1"}, {"NVIDIA_TF32_OVERRIDE": ""}])
def test_fp32_under_tensorrt_needs_an_environment_without_tf32(
    sealed: Bundle, root: Path, environment: Mapping[str, str]
) -> None:
    runtime = FakeRuntime()
    with pytest.raises(DeviceUnavailable, match="unless NVIDIA_TF32_OVERRIDE=0 is in the environment"):
        opened(sealed, root, runtime, device="tensorrt", precision="fp32", on=On(environment=environment))
    assert not runtime.opened
    for device, precision in (("tensorrt", "fp16"), ("tensorrt", "int8"), ("cuda", "fp32")):
        opened(sealed, root, runtime, device=device, precision=precision, on=On(environment=environment))
    opened(sealed, root, runtime, device="tensorrt", precision="fp32", on=On(environment=EXACT))


# Runs that fail


def fails_on(length: int) -> Callable[[Sequence[int]], float]:
    """A score, but for rows of so many tokens."""

    def score(ids: Sequence[int]) -> float:
        if len(ids) == length:
            raise ScoringError("out of GPU memory")
        return score_of(ids)

    return score


@pytest.mark.parametrize(("length", "runs"), [(LONGEST, 1), (MIDDLE, 4)])
def test_a_run_that_fails_while_opening_is_repeated_nowhere(sealed: Bundle, root: Path, length: int, runs: int) -> None:
    runtime = FakeRuntime(lambda device, gpu: FakeSession(device, fails_on(length)))
    with pytest.raises(ScoringError, match="out of GPU memory"):
        opened(sealed, root, runtime, gpus=[0, 1])
    (session,) = runtime.sessions
    assert len(session.batches) == runs


class Meeting(FakeSession):
    """A run ends only while another GPU's goes on too; one that holds a row of 5 tokens fails at once."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__("cuda", fails_on(5))
        self._barrier = barrier

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        scores = super().run(inputs)
        self._barrier.wait(timeout=30)  # breaks if this GPU runs alone
        return scores


def test_a_run_that_fails_is_not_repeated_on_the_other_gpu_and_both_are_free_afterwards() -> None:
    barrier = threading.Barrier(2)
    sessions = [Meeting(barrier), Meeting(barrier)]
    shared = SharedSession(sessions, device="cuda")
    for runs in (1, 2, 3):
        with pytest.raises(ScoringError, match="out of GPU memory"):
            shared.run(inputs_of([TOKENS[0]]))
        assert sum(len(session.batches) for session in sessions) == runs
    with ThreadPoolExecutor(2) as callers:
        scores = list(callers.map(lambda ids: float(shared.run(inputs_of([ids]))[0]), TOKENS[1:3]))
    np.testing.assert_allclose(scores, [score_of(ids) for ids in TOKENS[1:3]], atol=1e-6)


def test_two_gpus_run_at_the_same_time() -> None:
    barrier = threading.Barrier(2)
    sessions = [Meeting(barrier), Meeting(barrier)]
    shared = SharedSession(sessions, device="cuda")
    with ThreadPoolExecutor(2) as callers:
        runs = [callers.submit(shared.run, inputs_of([[0, number, 2]])) for number in range(10, 30)]
        scores = [float(run.result(timeout=30)[0]) for run in runs]
    np.testing.assert_allclose(scores, [score_of([0, number, 2]) for number in range(10, 30)], atol=1e-6)
    assert [len(session.batches) for session in sessions] == [10, 10]


class Gated(FakeSession):
    """Says when a run begins, ends it when the gate opens, and counts how many there are at once."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__("cuda")
        self.most = 0
        self.has_begun = threading.Event()
        self._gate = gate
        self._inside = 0
        self._lock = threading.Lock()

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        self.has_begun.set()
        assert self._gate.wait(timeout=30)
        with self._lock:
            self._inside -= 1
        return super().run(inputs)


def test_a_run_waits_where_no_gpu_is_free() -> None:
    gate = threading.Event()
    sessions = [Gated(gate), Gated(gate)]
    shared = SharedSession(sessions, device="cuda")
    with ThreadPoolExecutor(6) as callers:
        runs = [callers.submit(shared.run, inputs_of([ids])) for ids in TOKENS[:2]]
        assert all(session.has_begun.wait(timeout=30) for session in sessions)
        runs += [callers.submit(shared.run, inputs_of([ids])) for ids in TOKENS[2:]]
        with pytest.raises(TimeoutError):
            runs[2].result(timeout=0.05)
        gate.set()
        scores = [float(run.result(timeout=30)[0]) for run in runs]
    np.testing.assert_allclose(scores, [score_of(ids) for ids in TOKENS], atol=1e-6)
    assert [session.most for session in sessions] == [1, 1]


def test_several_gpus_are_all_proven_and_share_the_work(sealed: Bundle, root: Path, tokenizer: PairTokenizer) -> None:
    runtime = FakeRuntime()
    session = opened(sealed, root, runtime, gpus=[1, 0])
    assert isinstance(session, SharedSession)
    assert session.device == "cuda"
    assert [options["device_id"] for options in runtime.options] == ["1", "0"]
    assert runtime.sessions[0].shapes == runtime.sessions[1].shapes
    pairs = [("word " * count, "yes") for count in range(1, 40)]
    model = plan_gpu(sealed, "cuda", "fp16", gpus=[0, 1], max_batch_tokens=BUDGET, there=[H100] * 2)
    runner = Runner(session, model.grouping, pad_token_id=1, narrow_session=session, callers=2)
    with Scorer(tokenizer, runner) as scorer:
        scores = scorer.score(pairs)
    np.testing.assert_allclose(scores, [score_of(ids.tolist()) for ids in tokenizer.encode(pairs).token_ids], atol=1e-6)


# Buckets


@pytest.mark.parametrize(("rows", "length"), [(3, 20), (1, 8), (1, 64), (9, 16), (5, 32)])
def test_a_shape_that_no_engine_was_built_for_is_refused_and_not_run(rows: int, length: int) -> None:
    sessions = {16: FakeSession("tensorrt"), 32: FakeSession("tensorrt")}
    bucketed = BucketedSession(sessions, {16: 8, 32: 4}, device="tensorrt")
    with pytest.raises(ScoringError, match=f"takes {rows} x {length} tokens; .* up to 8 x 16, 4 x 32: score with the"):
        bucketed.run(full_batch(rows, length, pad_token_id=1))
    assert not any(session.batches for session in sessions.values())


def test_a_batch_runs_on_the_engine_of_its_length() -> None:
    sessions = {16: FakeSession("tensorrt"), 32: FakeSession("tensorrt")}
    bucketed = BucketedSession(sessions, {16: 8, 32: 4}, device="tensorrt")
    for rows, length in ((4, 32), (8, 16), (1, 16)):
        assert bucketed.run(full_batch(rows, length, pad_token_id=1)).shape == (rows,)
    assert {bucket: session.shapes for bucket, session in sessions.items()} == {16: [(8, 16), (1, 16)], 32: [(4, 32)]}


@st.composite
def lengths_and_buckets(draw: st.DrawFn) -> tuple[Ids, tuple[int, ...]]:
    """Buckets, and lengths of rows that fit into them."""
    buckets = tuple(sorted(draw(st.sets(st.integers(1, 600), min_size=1, max_size=6))))
    lengths = draw(st.lists(st.integers(1, buckets[-1]), max_size=120))
    return np.array(lengths, dtype=np.int64), buckets


budgets = st.integers(1, 3000)
paddings: st.SearchStrategy[Padding] = st.sampled_from(("removed", "avoided", "allowed"))


@settings(deadline=None)
@given(
    case=lengths_and_buckets(),
    budget=budgets,
    asked=st.none() | budgets,
    padding=st.none() | paddings,
    callers=st.integers(1, 4),
)
def test_whatever_is_asked_of_a_call_every_batch_fits_an_engine(
    case: tuple[Ids, tuple[int, ...]],
    budget: int,
    asked: int | None,
    padding: Padding | None,
    callers: int,
) -> None:
    lengths, buckets = case
    session, grouping = FakeSession("tensorrt"), Grouping(budget, "avoided", buckets)
    runner = Runner(session, grouping, pad_token_id=1, narrow_session=session, callers=callers)
    batches = runner.plan(lengths, grouping.changed(max_batch_tokens=asked, padding=padding)).batches
    runner.close()
    assert sorted(int(row) for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.length in buckets
        assert 1 <= len(batch.rows) <= max(1, min(budget, asked or budget) // batch.length)
        shorter = max((bucket for bucket in buckets if bucket < batch.length), default=0)
        assert ((shorter < lengths[batch.rows]) & (lengths[batch.rows] <= batch.length)).all()


def grouped(grouping: Grouping) -> GpuModel:
    """A model of the package's own bundle, which is not opened here, with that grouping."""
    return GpuModel(open_bundle(EMBEDDED), "any", "fp16", (0,), grouping)


@settings(deadline=None)
@given(case=lengths_and_buckets(), budget=budgets)
def test_every_engine_scores_all_of_the_canary_that_it_can_take(case: tuple[Ids, tuple[int, ...]], budget: int) -> None:
    lengths, buckets = case
    batches = canary_batches(lengths, grouped(Grouping(budget, "avoided", buckets)))
    assert all(len(batch.rows) <= max(1, budget // batch.length) for batch in batches)
    for bucket in buckets:
        scored = [int(row) for batch in batches if batch.length == bucket for row in batch.rows]
        assert scored == [row for row, length in enumerate(lengths) if length <= bucket]


@settings(deadline=None)
@given(case=lengths_and_buckets(), budget=budgets, padding=paddings)
def test_without_buckets_the_canary_is_planned_as_the_scorer_plans(
    case: tuple[Ids, tuple[int, ...]], budget: int, padding: Padding
) -> None:
    lengths, _ = case
    grouping = Grouping(budget, padding)
    planned = Runner(FakeSession("cuda"), grouping, pad_token_id=1).plan(lengths)
    one, other = (
        [(batch.rows.tolist(), batch.length) for batch in batches]
        for batches in (canary_batches(lengths, grouped(grouping)), planned.batches)
    )
    assert one == other


# Engines of TensorRT


def test_every_bucket_has_an_engine_of_its_own_shapes_in_the_private_cache(sealed: Bundle, root: Path) -> None:
    runtime = FakeRuntime()
    opened(sealed, root, runtime, device="tensorrt", gpus=[1])
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
    opened(sealed, root, runtime, device="tensorrt")
    before = kept(root)
    moved = sealed.path.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        opened(open_bundle(moved), root, runtime, device="tensorrt")
    assert kept(root) == before
    assert runtime.found == [[], [], [], *[[MANIFEST, ENGINE]] * 3]
    assert runtime.engines[:3] == runtime.engines[3:]
    assert not caplog.records


def test_other_weights_under_the_same_names_get_engines_of_their_own(
    sealed: Bundle, tmp_path: Path, root: Path
) -> None:
    runtime = FakeRuntime()
    opened(sealed, root, runtime, device="tensorrt")
    before = kept(root)
    swapped = write_bundle(tmp_path / "swapped", weights="WEIGHTS")
    opened(swapped, root, runtime, device="tensorrt")
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
        pytest.param({"on": On(versions={**VERSIONS, "onnxruntime": "1.32.0"})}, id="another ONNX Runtime"),
        pytest.param({"on": On(versions={**VERSIONS, "tensorrt": "101400"})}, id="another TensorRT"),
        pytest.param({"on": On(versions={**VERSIONS, "driver": "13.1"})}, id="another driver"),
        pytest.param({"precision": "int8"}, id="another precision"),
    ],
)
def test_an_engine_of_another_machine_is_not_used(sealed: Bundle, root: Path, other: dict[str, Any]) -> None:
    runtime = FakeRuntime()
    opened(sealed, root, runtime, device="tensorrt")
    before = kept(root)
    opened(sealed, root, runtime, device="tensorrt", **other)
    assert runtime.found == [[]] * 6
    assert len(kept(root) - before) == 3
    opened(sealed, root, runtime, device="tensorrt")
    assert runtime.found[6:] == [[MANIFEST, ENGINE]] * 3


def test_an_engine_with_a_changed_byte_is_built_again(
    sealed: Bundle, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime()
    opened(sealed, root, runtime, device="tensorrt")
    changed = Path(runtime.options[1]["trt_engine_cache_path"]).name.split(".")[0]
    flip_byte(root / changed / ENGINE)
    opened(sealed, root, runtime, device="tensorrt")
    assert runtime.found[3:] == [[MANIFEST, ENGINE], [], [MANIFEST, ENGINE]]
    assert runtime.engines[3:] == runtime.engines[:3]
    assert f"the engine in {root / changed} is not used but built again" in caplog.text


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
    opened(sealed, root, runtime, device="tensorrt")
    assert runtime.found == [[], [], []]
    assert left.split(".")[0] in kept(root)  # it is the engine that was asked for again
    assert left not in kept(root)
    assert all(engine.startswith(b"weights") for engine in runtime.engines)


# Plans


def planned(bundle: Bundle, **options: Any) -> GpuModel:
    usual: dict[str, Any] = {"device": "cuda", "precision": "fp16", "gpus": (0,), "there": (H100, H100)}
    return plan_gpu(bundle, max_batch_tokens=BUDGET, **{**usual, **options})


def test_a_plan_is_what_was_asked_for(sealed: Bundle) -> None:
    assert planned(sealed, gpus=[1, 0]) == GpuModel(sealed, "cuda", "fp16", (1, 0), Grouping(BUDGET, "allowed"))
    tensorrt = planned(sealed, device="tensorrt", precision="int8")
    assert tensorrt == GpuModel(sealed, "tensorrt", "int8", (0,), Grouping(BUDGET, "avoided", BUCKETS))


def test_padding_counts_on_cuda_though_its_graph_removes_it(sealed: Bundle) -> None:
    """Or a batch of one long row and many short ones would take any memory for its embeddings."""
    assert ("cuda", "fp16") in sealed.manifest.unpadded
    batches = canary_batches(np.array([LONGEST, *[2] * 60], dtype=np.int64), planned(sealed))
    assert all(batch.padded_tokens <= BUDGET for batch in batches)


@pytest.mark.parametrize("gpus", [(2,), (-1,), (0, 2), (0, 0), (1, 0, 1), ()])
def test_gpus_that_are_not_there_or_named_twice_or_none_are_refused(sealed: Bundle, gpus: tuple[int, ...]) -> None:
    with pytest.raises(DeviceUnavailable, match="were asked for; there are 2, numbered from 0") as caught:
        planned(sealed, gpus=gpus)
    assert f"GPUs {list(gpus)} " in str(caught.value)


def test_without_a_gpu_there_is_no_plan(sealed: Bundle) -> None:
    with pytest.raises(DeviceUnavailable, match="there are 0"):
        planned(sealed, there=())


@pytest.mark.parametrize(
    "buckets", [[16, 32], [32, 16, 64], [16, 16, 64], [16, 64, 128], [0, 64], [-8, 64], [64, 32]], ids=str
)
def test_buckets_that_do_not_ascend_to_the_longest_pair_are_refused(tmp_path: Path, buckets: list[int]) -> None:
    def change(document: dict[str, Any]) -> None:
        document["targets"]["tensorrt"]["buckets"] = buckets

    bundle = write_bundle(tmp_path / "bundle", change=change)
    with pytest.raises(BundleError, match="do not ascend to its 64 tokens; export it again") as caught:
        planned(bundle, device="tensorrt")
    assert str(buckets) in str(caught.value)
    planned(bundle, device="cuda")


def test_a_bundle_that_names_no_buckets_has_the_usual_ones(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", change=lambda document: document["targets"]["tensorrt"].pop("buckets"))
    assert planned(bundle, device="tensorrt").grouping.buckets == (64,)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_precision_that_the_bundle_lacks_for_the_device_is_refused_with_how_to_get_it(
    tmp_path: Path, device: str
) -> None:
    name = TARGETS[device]["fp32"]

    def change(document: dict[str, Any]) -> None:
        document["targets"][device]["precisions"].remove("fp32")
        (tmp_path / "bundle" / name).unlink()
        del document["files"][name]

    bundle = write_bundle(tmp_path / "bundle", change=change)
    problem = f"has no fp32 model for {device}, only fp16.*; export it with --precision fp32 --target {device}"
    with pytest.raises(PrecisionUnavailable, match=problem):
        planned(bundle, device=device, precision="fp32")


def test_int8_is_for_tensorrt_alone(sealed: Bundle) -> None:
    with pytest.raises(PrecisionUnavailable, match="has no int8 model for cuda, only fp32, fp16"):
        planned(sealed, precision="int8")


# This machine


@pytest.fixture
def quick(tmp_path: Path) -> Bundle:
    """A bundle whose model is so large that even a fake is fast enough, by any clock."""
    return write_bundle(tmp_path / "quick", change=lambda document: document["model"].update(hidden_size=2**20))


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    """This machine as if it had GPUs: only ONNX Runtime's sessions and what is installed are replaced."""
    runtime = FakeRuntime()

    def open_session(model: Path, *, device: str, providers: Providers) -> FakeSession:
        assert PROVIDERS[device] == providers[0][0]
        return runtime.open(model, providers)

    monkeypatch.setenv("CAPPY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu, "open_session", open_session)
    monkeypatch.setattr(gpu, "inspect_installation", lambda **asked: HERE)
    monkeypatch.setattr(gpu, "tensorrt_version", lambda: "101303")
    return runtime


def test_on_this_machine_the_model_is_opened(quick: Bundle, runtime: FakeRuntime) -> None:
    session = open_on_gpus(planned(quick, precision="fp32", gpus=[1]), find_machine("cuda", [1]))
    assert session is runtime.sessions[0]
    assert runtime.options[0]["device_id"] == "1"


def test_on_this_machine_engines_are_kept_where_the_environment_says(
    quick: Bundle, runtime: FakeRuntime, root: Path
) -> None:
    session = open_on_gpus(planned(quick, device="tensorrt", precision="int8"), find_machine("tensorrt"))
    assert session.device == "tensorrt"
    (facts, *_) = [json.loads((root / name / MANIFEST).read_bytes())["facts"] for name in kept(root)]
    assert facts["versions"] == VERSIONS
    assert facts["gpu"] == {
        "name": H100.name,
        "compute_capability": H100.compute_capability,
        "memory_bytes": str(H100.memory_bytes),
    }


@pytest.mark.usefixtures("runtime")
def test_on_this_machine_tf32_is_looked_for_in_the_environment(quick: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planned(quick, device="tensorrt", precision="fp32")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(DeviceUnavailable, match="NVIDIA_TF32_OVERRIDE=0"):
        open_on_gpus(model, find_machine("tensorrt"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    open_on_gpus(model, find_machine("tensorrt"))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="needs an ONNX Runtime without CUDA"
)
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_where_onnx_runtime_has_no_provider_the_device_is_refused_with_it(device: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"(?s)'{device}' cannot be used here:.* no {PROVIDERS[device]}:"):
        find_machine(device)


def test_the_libraries_of_pip_are_loaded_before_they_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []

    def inspect(
        *, device: str, available_providers: Callable[[], object], preload: Callable[[], object]
    ) -> Installation:
        asked.append((device, preload()))
        return HERE

    installed = SimpleNamespace(get_available_providers=lambda: list(HERE.providers), preload_dlls=lambda: "preloaded")
    monkeypatch.setattr(gpu, "load_runtime", lambda: installed)
    monkeypatch.setattr(gpu, "inspect_installation", inspect)
    monkeypatch.setattr(gpu, "tensorrt_version", lambda: "101303")
    assert find_machine("cuda").installation is HERE
    del installed.preload_dlls  # as in older ones
    assert find_machine("tensorrt").installation is HERE
    assert asked == [("cuda", "preloaded"), ("tensorrt", None)]


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
