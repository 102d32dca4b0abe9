"""What a GPU check measures, step by step; each runs in a process of its own, so that a crash costs one step only.

Engines are opened first, since the first opening of each builds it. Our sessions are opened before PyTorch is imported,
which brings CUDA's libraries with it (`cappy_bench.gpu.host`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.gpu.host import Environment, Machine, scorer_of
from cappy_bench.gpu.results import OURS, TORCH, Figures, make_cell
from cappy_bench.peers.peer import Pair
from cappy_bench.peers.process import in_short
from cappy_bench.speed.workloads import Sizes, make_pool_like, make_workloads, read_pool
from cappy_engine import batching
from cappy_engine.batching import Grouping
from cappy_engine.bundle import MANIFEST, open_bundle
from cappy_engine.gpu.engines import engine_folder
from cappy_engine.gpu.plan import BATCH_TOKENS, GpuModel, full_batch
from cappy_engine.gpu.start import NO_TF32
from cappy_engine.session import Session
from cappy_engine.tokenizer import PairTokenizer

MODELS = (("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "int8"))
ROWS = (1, 8, 32, 128)
PARITY_SHAPES = ((1, None), (2048, None), (BATCH_TOKENS, None))
"""Budgets of the batches in which parity is measured: one by one, and as large as a GPU gets them."""
REFERENCE = "reference.json"
WARM_UPS = 3

Run = Callable[[], object]


class CheckFailed(Exception):
    """A step did not end as it must; `figures` are what it measured all the same."""

    def __init__(self, reason: str, figures: Figures | None = None) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass(frozen=True)
class Effort:
    """How often a batch is run, how often a batch of one, how many pairs the mixed workload has, and how many are made
    to take them from where there are no real texts."""

    runs: int
    single_runs: int
    pairs: int
    pool: int


FULL, QUICK = Effort(15, 100, 2000, 4000), Effort(2, 3, 24, 400)


@dataclass(frozen=True)
class Check:
    """What is checked. `work` is a folder for files between the steps, `data` one with real texts, if any."""

    machine: Machine
    checkpoint: Path
    bundle: Path
    work: Path
    data: Path | None
    effort: Effort


@dataclass(frozen=True)
class Step:
    """`run` returns figures, or raises (CheckFailed, where it has figures to keep). It needs `device`, and runs in a
    process with `environment` beside the usual one. The part of `name` before the first slash is its group."""

    name: str
    device: str
    run: Callable[[Check], Figures]
    environment: Environment = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What `--only` takes."""
        return self.name.partition("/")[0]


def measuring_steps(buckets: Sequence[int]) -> list[Step]:
    """Opening, parity and throughput, in the order in which they run."""
    steps = []
    for device, precision in MODELS:
        run = partial(time_opening, device=device, precision=precision)
        if device == "cuda":
            steps.append(Step(f"open/cuda/{precision}", device, run))
            continue
        environment = _environment(device, precision)
        steps.append(Step(f"open/{device}/{precision}/first", device, partial(run, is_first=True), environment))
        steps.append(Step(f"open/{device}/{precision}/again", device, run, environment))
    steps.append(Step("parity/reference", "cuda", score_reference))
    for device, precision in MODELS:
        run = partial(measure_parity, device=device, precision=precision)
        steps.append(Step(f"parity/{device}/{precision}", device, run, _environment(device, precision)))
    with_tf32 = partial(measure_parity, device="cuda", precision="fp32", tf32=True)
    steps.append(Step("parity/cuda/fp32-tf32", "cuda", with_tf32))
    steps.append(Step("parity/pytorch/fp16", "cuda", partial(measure_parity, device="pytorch", precision="fp16")))
    steps += [Step(f"throughput/{length}", "cuda", partial(measure_length, length=length)) for length in buckets]
    return [*steps, Step("throughput/mixed", "cuda", measure_mixed)]


def time_opening(check: Check, *, device: str, precision: str, is_first: bool = False) -> Figures:
    """How long `Scorer.open` takes in a fresh process. TensorRT's first opening builds engines, others must not."""
    before = engines()
    began = time.perf_counter()
    check.machine.open_scorer(check.bundle, device, precision).close()
    seconds = time.perf_counter() - began
    built = len(engines() - before)
    figures = {"opened_seconds": seconds, "engines_built": built, "note": None}
    if device != "tensorrt":
        return {**figures, "engines_built": None}
    if is_first and not built and before:
        return {"opened_seconds": None, "engines_built": None, "note": "not measured: the engines were there already"}
    if is_first and not built:
        raise CheckFailed("no engine was kept, so every start builds them again", figures)
    if not is_first and built:
        raise CheckFailed(f"{built} engines were built again, though they had just been built", figures)
    return figures


def engines() -> frozenset[str]:
    """The keys of all engines that are kept."""
    return frozenset(path.parent.name for path in engine_folder().glob(f"*/{MANIFEST}"))


def score_reference(check: Check) -> Figures:
    """Score the parity pairs with PyTorch in fp32 on the CPU, and keep the scores for the other steps."""
    from cappy_export.proof.pairs import default_pairs

    (check.work / REFERENCE).unlink(missing_ok=True)  # of an earlier run, maybe of another checkpoint
    pairs = default_pairs()
    reference = check.machine.score_reference(check.checkpoint, pairs, open_bundle(check.bundle).manifest.max_length)
    kept = {name: np.asarray(value).tolist() for name, value in vars(reference).items()}
    (check.work / REFERENCE).write_text(json.dumps(kept), encoding="utf-8")
    return {"pairs": len(pairs), "outcome": f"{len(pairs)} pairs, {reference.description}"}


def measure_parity(check: Check, *, device: str, precision: str, tf32: bool = False) -> Figures:
    """How far a model's scores are from PyTorch's; CheckFailed beyond LIMITS, but for TF32 and for PyTorch's fp16."""
    if device == "pytorch":
        scorer = scorer_of(*_open_torch(check))
    elif tf32:
        scorer = scorer_of(*check.machine.open_session(check.bundle, device, precision, True))
    else:
        scorer = check.machine.open_scorer(check.bundle, device, precision)
    from cappy_export.proof.limits import LIMITS
    from cappy_export.proof.pairs import default_pairs  # PyTorch comes with it: not before our session is open
    from cappy_export.proof.parity import measure, require_same_tokens, score_in_shapes, violations
    from cappy_export.proof.reference import Reference

    if not (check.work / REFERENCE).exists():
        raise CheckFailed("there are no scores to compare with: the step parity/reference did not end well")
    kept = json.loads((check.work / REFERENCE).read_text(encoding="utf-8"))
    arrays = (np.array(kept["scores"], np.float32), np.array(kept["token_counts"]), np.array(kept["truncated"]))
    reference = Reference(*arrays)
    pairs = default_pairs()
    with scorer:
        scored, shapes = score_in_shapes(scorer, pairs, PARITY_SHAPES)
    require_same_tokens(scored, reference, pairs)
    found = measure(reference.scores, scored.scores, pairs, reference.token_counts)
    texts = ("instruction", "response")
    worst = [{name: value for name, value in row.items() if name not in texts} for row in found["worst"]]
    is_limited = device != "pytorch" and not tf32
    limits = asdict(LIMITS[precision]) if is_limited else None
    figures = {**found, "worst": worst, "pairs": len(pairs), "batch_shapes": shapes, "limits": limits}
    broken = violations({"precisions": {}, "targets": {device: {precision: figures}}}, LIMITS)
    if broken and is_limited:
        raise CheckFailed("; ".join(broken), figures)
    return figures


def measure_length(check: Check, *, length: int) -> Figures:
    """Batches of rows of one length, without padding: ours and PyTorch in turns, arrays in and scores out for both."""
    shape, opened, failed = read_shape(check.bundle), *open_contestants(check)
    sessions = {name: session for name, (session, _) in opened.items()}
    most = min(plan.max_rows(length) for _, plan in opened.values())
    pad_token_id = open_bundle(check.bundle).manifest.pad_token_id
    cells = []
    for rows in (rows for rows in ROWS if rows <= most):
        inputs = random_batch(rows, length, words=shape["vocab_size"], pad_token_id=pad_token_id)
        runs = {name: partial(session.run, inputs) for name, session in sessions.items()}
        seconds, broken = time_in_turns(runs, runs=check.effort.single_runs if rows == 1 else check.effort.runs)
        failed |= {f"{name}, {rows} x {length}": reason for name, reason in broken.items()}
        cells += [make_cell(name, [length] * rows, seconds.get(name, []), shape) for name in (*OURS, TORCH)]
    return _unless_failed({"cells": cells, "failed": failed})


def measure_mixed(check: Check) -> Figures:
    """Many pairs of mixed lengths in one call, from texts to scores, tokenisation included on both sides."""
    shape, opened, failed = read_shape(check.bundle), *open_contestants(check)
    scorers = {name: scorer_of(session, plan) for name, (session, plan) in opened.items()}
    manifest = open_bundle(check.bundle).manifest
    tokenizer = PairTokenizer.from_file(check.bundle / "tokenizer.json", max_length=manifest.max_length)
    pairs, source = mixed_pairs(check, tokenizer)
    lengths = tokenizer.encode(pairs).lengths.tolist()
    runs = {name: partial(scorer.score, pairs) for name, scorer in scorers.items()}
    seconds, broken = time_in_turns(runs, runs=check.effort.runs)
    cells = [make_cell(name, lengths, seconds.get(name, []), shape) for name in (*OURS, TORCH)]
    return _unless_failed({"cells": cells, "failed": failed | broken, "pairs": source})


def open_contestants(check: Check) -> tuple[dict[str, tuple[Session, GpuModel]], dict[str, str]]:
    """Every contestant that opens, with its plan, and why the others do not; CheckFailed if none does."""
    opened: dict[str, tuple[Session, GpuModel]] = {}
    failed: dict[str, str] = {}
    for name in (*OURS, TORCH):
        device, _, precision = name.partition(" ")
        try:
            if name == TORCH:
                opened[name] = _open_torch(check)
            else:
                opened[name] = check.machine.open_session(check.bundle, device, precision, False)
        except Exception as error:  # whatever a library raises: it stands in the result, and the others go on
            failed[name] = in_short(f"{type(error).__name__}: {error}")
    if not opened:
        raise CheckFailed(f"nothing could be opened: {failed}")
    return opened, failed


def time_in_turns(
    runs_by_name: Mapping[str, Run], *, runs: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every run, by name, taken in turns that are reversed each time; and why some could not run at all."""
    failed = {}
    for name, run in runs_by_name.items():
        try:
            for _ in range(WARM_UPS):
                run()
        except Exception as error:  # such as too little memory for this batch
            failed[name] = in_short(f"{type(error).__name__}: {error}")
    able = [name for name in runs_by_name if name not in failed]
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for turn in range(runs):
        for name in able if turn % 2 == 0 else reversed(able):
            began = clock()
            runs_by_name[name]()
            seconds[name].append(clock() - began)
    return seconds, failed


def random_batch(rows: int, length: int, *, words: int, pad_token_id: int) -> dict[str, npt.NDArray[np.int64]]:
    """Inputs of that shape, without padding. Random tokens: a GPU multiplies equal numbers a little faster."""
    ids = np.random.default_rng(0).integers(0, words, (rows, length), dtype=np.int64)
    ids[ids == pad_token_id] = 0 if pad_token_id else 1
    return {
        **full_batch(rows, length, pad_token_id=pad_token_id),
        "input_ids": ids,
        "position_ids": batching.position_ids(ids, pad_token_id=pad_token_id),
    }


def mixed_pairs(check: Check, tokenizer: PairTokenizer) -> tuple[list[Pair], str]:
    """The pairs of the benchmarks' workload "bulk", and where they are from."""
    from cappy_export.proof.pairs import default_pairs

    pairs, source = read_pool(check.data, seed=0) if check.data else [], "PromptSource's and BIG-Bench's tasks"
    if not pairs:
        pairs = make_pool_like(default_pairs(), seed=0, count=check.effort.pool)
        source = "made of words of the package's parity pairs"
    sizes = Sizes(interactive=1, lengths=1, rerank=1, bulk=check.effort.pairs, long=1, padded=1)
    bulk = next(found for found in make_workloads(pairs, tokenizer, sizes, seed=0) if found.name == "bulk")
    return bulk.pairs, source


def read_shape(bundle: Path) -> dict[str, int]:
    """What the model's operations are counted from, and how many tokens there are."""
    config: dict[str, Any] = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    names = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "layers": "num_hidden_layers"}
    return {name: int(config[key]) for name, key in {**names, "vocab_size": "vocab_size"}.items()}


def _environment(device: str, precision: str) -> Environment:
    """Without this variable TensorRT computes fp32 in TF32, and our code refuses it."""
    return {NO_TF32: "0"} if (device, precision) == ("tensorrt", "fp32") else {}


def _open_torch(check: Check) -> tuple[Session, GpuModel]:
    """PyTorch, with batches as large as ours."""
    plan = GpuModel(open_bundle(check.bundle), "cuda", "fp16", (0,), Grouping(BATCH_TOKENS))
    return check.machine.open_torch(check.checkpoint), plan


def _unless_failed(figures: Figures) -> Figures:
    if figures["failed"]:
        raise CheckFailed("; ".join(f"{name}: {reason}" for name, reason in figures["failed"].items()), figures)
    return figures
