"""Measures a GPU step by step.

Each step runs in a process of its own, so that a crash costs one step only. Engines are opened first, since the first
opening of each builds it. Our sessions are opened before PyTorch is imported, which brings CUDA's libraries with it
(`cappy_bench.gpu.host`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from cappy_bench.gpu.host import Environment, scorer_of
from cappy_bench.gpu.plan import Check, CheckFailed, Step
from cappy_bench.gpu.results import Figures
from cappy_bench.gpu.throughput import measure_length, measure_mixed
from cappy_engine.bundle import MANIFEST, open_bundle
from cappy_engine.gpu.engines import engine_folder
from cappy_engine.gpu.plan import BATCH_TOKENS
from cappy_engine.gpu.start import NO_TF32
from cappy_engine.storage import write_json
from cappy_export.proof.limits import default_limits
from cappy_export.proof.pairs import default_pairs

MODELS = (("cuda", "fp32"), ("cuda", "fp16"), ("tensorrt", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "int8"))
PARITY_SHAPES = ((1, None), (2048, None), (BATCH_TOKENS, None))
"""Budgets of the batches in which parity is measured: one by one, and as large as a GPU gets them."""
REFERENCE = "reference.json"


def measuring_steps(buckets: Sequence[int]) -> list[Step]:
    """List the steps that measure opening, parity and throughput, in their order.

    >>> measuring_steps((64, 512))[0].name
    'open/cuda/fp32'
    """
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
    """Time `Scorer.open` in a fresh process.

    TensorRT's first opening must build engines, the others must not.

    >>> time_opening(check, device="cuda", precision="fp16")["opened_seconds"]
    """
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
    """List the keys of all engines that are kept.

    >>> engines()
    frozenset()
    """
    return frozenset(path.parent.name for path in engine_folder().glob(f"*/{MANIFEST}"))


def score_reference(check: Check) -> Figures:
    """Score the parity pairs with PyTorch in fp32 on the CPU, for the other steps.

    >>> score_reference(check)["pairs"]
    279
    """
    (check.work / REFERENCE).unlink(missing_ok=True)  # of an earlier run, maybe of another checkpoint
    pairs = default_pairs()
    reference = check.machine.score_reference(check.checkpoint, pairs, open_bundle(check.bundle).manifest.max_length)
    kept = {name: np.asarray(value).tolist() for name, value in vars(reference).items()}
    write_json(check.work / REFERENCE, kept)
    return {"pairs": len(pairs), "outcome": f"{len(pairs)} pairs, {reference.description}"}


def measure_parity(check: Check, *, device: str, precision: str, tf32: bool = False) -> Figures:
    """Measure how far a model's scores are from PyTorch's.

    Raises CheckFailed beyond `default_limits`, which TF32 and PyTorch's own fp16 need not keep.

        >>> measure_parity(check, device="cuda", precision="fp16")["max_error"]
    """
    if device == "pytorch":
        scorer = scorer_of(*check.open_torch())
    elif tf32:
        scorer = scorer_of(*check.machine.open_session(check.bundle, device, precision, True))
    else:
        scorer = check.machine.open_scorer(check.bundle, device, precision)
    # PyTorch comes with these: not before our session is open
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
    allowed = default_limits(reference.spread)
    limits = asdict(allowed[precision]) if is_limited else None
    figures = {**found, "worst": worst, "pairs": len(pairs), "batch_shapes": shapes, "limits": limits}
    broken = violations({"precisions": {}, "targets": {device: {precision: figures}}}, allowed)
    if broken and is_limited:
        raise CheckFailed("; ".join(broken), figures)
    return figures


def _environment(device: str, precision: str) -> Environment:
    """Without this variable TensorRT computes fp32 in TF32, and our code refuses it."""
    return {NO_TF32: "0"} if (device, precision) == ("tensorrt", "fp32") else {}
