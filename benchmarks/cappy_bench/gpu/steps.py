"""Measures a GPU step by step.

Each step runs in a process of its own, so that a crash costs one step only. Our sessions are opened before PyTorch is
imported, which brings CUDA's libraries with it (`cappy_bench.gpu.host`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from cappy_bench.gpu.attention import measure_attention, run_attention
from cappy_bench.gpu.facts import describe_bundle, lengths_of
from cappy_bench.gpu.host import Environment, scorer_of
from cappy_bench.gpu.plan import Check, CheckFailed, Step
from cappy_bench.gpu.profile import profile_batches
from cappy_bench.gpu.questions import measure_questions
from cappy_bench.gpu.results import ON_CUDA, OURS, Figures
from cappy_bench.gpu.throughput import measure_length, measure_mixed
from cappy_engine.bundle import MANIFEST, open_bundle
from cappy_engine.gpu.engines import engine_folder
from cappy_engine.gpu.plan import BATCH_TOKENS
from cappy_engine.gpu.start import NO_TF32
from cappy_engine.storage import write_json
from cappy_export.proof.limits import default_limits
from cappy_export.proof.pairs import default_pairs

FLOATS = ("fp16", "fp32")
PARITY_SHAPES = ((1, None), (2048, None), (BATCH_TOKENS, None))
"""Budgets of the batches in which parity is measured: one by one, and as large as a GPU gets them."""
REFERENCE = "reference.json"


def measuring_steps(buckets: Sequence[int]) -> list[Step]:
    """List the steps that measure opening, parity and throughput, in their order: the most valuable first.

    >>> measuring_steps((64, 512))[0].name
    'open/cuda/fp16'
    """
    *longer, shortest = sorted(buckets, reverse=True)
    return [
        *(Step(f"open/cuda/{name}", "cuda", partial(_time_opening, device="cuda", precision=name)) for name in FLOATS),
        Step("attention/kernels", "cuda", run_attention, {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}),
        Step("throughput/cuda/mixed", "cuda", partial(measure_mixed, names=ON_CUDA)),
        Step("parity/reference", "cuda", _score_reference),
        *(_parity_step("cuda", precision) for precision in FLOATS),
        Step(f"throughput/cuda/{shortest}", "cuda", partial(measure_length, length=shortest, names=ON_CUDA)),
        *(_profile_step(name) for name in ON_CUDA[:2]),
        *(_questions_step(name) for name in ON_CUDA),
        Step("attention/speed", "cuda", measure_attention),
        *(
            Step(f"throughput/cuda/{length}", "cuda", partial(measure_length, length=length, names=ON_CUDA))
            for length in longer
        ),
        *(_parity_step("pytorch", precision) for precision in ("fp16", "bf16")),
        *_tensorrt_steps(buckets),
    ]


def _tensorrt_steps(buckets: Sequence[int]) -> list[Step]:
    """List TensorRT's: engines are opened first, since the first opening of each builds it."""
    steps = []
    for precision in (*FLOATS, "int8"):
        run, environment = partial(_time_opening, device="tensorrt", precision=precision), _environment(precision)
        steps.append(Step(f"open/tensorrt/{precision}/first", "tensorrt", partial(run, is_first=True), environment))
        steps.append(Step(f"open/tensorrt/{precision}/again", "tensorrt", run, environment))
    steps += [_parity_step("tensorrt", precision) for precision in (*FLOATS, "int8")]
    steps.append(Step("throughput/tensorrt/mixed", "tensorrt", partial(measure_mixed, names=OURS)))
    steps += [
        Step(f"throughput/tensorrt/{length}", "tensorrt", partial(measure_length, length=length, names=OURS))
        for length in buckets
    ]
    return steps


def _parity_step(device: str, precision: str) -> Step:
    needed = "cuda" if device == "pytorch" else device
    environment = _environment(precision) if device == "tensorrt" else {}
    run = partial(_measure_parity, device=device, precision=precision)
    return Step(f"parity/{device}/{precision}", needed, run, environment)


def _profile_step(name: str) -> Step:
    return Step(f"profile/{name.replace(' ', '-')}", "cuda", partial(profile_batches, name=name))


def _questions_step(name: str) -> Step:
    """TensorRT's engines take batches of their own size only, and have none."""
    return Step(f"questions/{name.replace(' ', '-')}", "cuda", partial(measure_questions, name=name))


def _time_opening(check: Check, *, device: str, precision: str, is_first: bool = False) -> Figures:
    """Time `Scorer.open` in a fresh process.

    TensorRT's first opening must build an engine for every length, the others none. All must be kept.
    """
    before = kept_engines(check.bundle, precision)
    began = time.perf_counter()
    check.machine.open_scorer(check.bundle, device, precision).close()
    seconds = time.perf_counter() - began
    if device != "tensorrt":
        return {"opened_seconds": seconds, "engines_built": None, "note": None}
    kept, needed = kept_engines(check.bundle, precision), len(lengths_of(open_bundle(check.bundle)))
    built = len(kept - before)
    figures = {"opened_seconds": seconds, "engines_built": built, "note": None}
    if len(kept) < needed:
        raise CheckFailed(f"{len(kept)} of {needed} engines were kept, so every start builds the others", figures)
    if not is_first and built:
        raise CheckFailed(f"{built} engines were built again, though they had just been built", figures)
    if is_first and built < needed:
        note = f"not measured: {needed - built} of {needed} engines were there already"
        return {**figures, "opened_seconds": None, "note": note}
    return figures


def kept_engines(folder: Path, precision: str) -> set[Path]:
    """Find the engines that are kept for the bundle in `folder`: each is a folder.

    >>> kept_engines(Path("bundle"), "fp16")
    set()
    """
    bundle = open_bundle(folder)
    digests = [bundle.manifest.files[name].sha256 for name in bundle.model_files(precision, "tensorrt")]
    ends = tuple(f" x {length}" for length in lengths_of(bundle))
    found = set()
    for manifest in engine_folder().glob(f"*/{MANIFEST}"):
        facts = json.loads(manifest.read_text(encoding="utf-8"))["facts"]
        is_of_model = facts["model_sha256"] == digests and facts["precision"] == precision
        if is_of_model and facts["profile"].endswith(ends):
            found.add(manifest.parent)
    return found


def _score_reference(check: Check) -> Figures:
    """Score the parity pairs with PyTorch in fp32 on the CPU, for the other steps."""
    (check.work / REFERENCE).unlink(missing_ok=True)  # of an earlier run, maybe of another checkpoint
    pairs = default_pairs()
    reference = check.machine.score_reference(check.checkpoint, pairs, open_bundle(check.bundle).manifest.max_length)
    kept = {name: np.asarray(value).tolist() for name, value in vars(reference).items()}
    write_json(check.work / REFERENCE, {**kept, "of": describe_bundle(open_bundle(check.bundle))["weights_sha256"]})
    return {"pairs": len(pairs), "outcome": f"{len(pairs)} pairs, {reference.description}"}


def _measure_parity(check: Check, *, device: str, precision: str) -> Figures:
    """Measure how far a model's scores are from PyTorch's.

    Raises CheckFailed beyond `default_limits`, which PyTorch's own fp16 need not keep.
    """
    if device == "pytorch":
        scorer = scorer_of(*check.open(f"pytorch {precision}"))
    else:
        scorer = check.machine.open_scorer(check.bundle, device, precision)
    # PyTorch comes with these: not before our session is open
    from cappy_export.proof.parity import measure, require_same_token_counts, score_in_shapes, violations
    from cappy_export.proof.reference import Reference

    if not (check.work / REFERENCE).exists():
        raise CheckFailed("there are no scores to compare with: the step parity/reference did not end well")
    kept = json.loads((check.work / REFERENCE).read_text(encoding="utf-8"))
    if kept["of"] != describe_bundle(open_bundle(check.bundle))["weights_sha256"]:
        raise CheckFailed(f"the scores in {check.work / REFERENCE} are of another checkpoint: run without --resume")
    arrays = (np.array(kept["scores"], np.float32), np.array(kept["token_counts"]), np.array(kept["truncated"]))
    reference = Reference(*arrays)
    pairs = default_pairs()
    with scorer:
        scored, shapes = score_in_shapes(scorer, pairs, PARITY_SHAPES)
    require_same_token_counts(scored, reference, pairs)
    found = measure(reference.scores, scored.scores, pairs, reference.token_counts)
    texts = ("instruction", "response")
    worst = [{name: value for name, value in row.items() if name not in texts} for row in found["worst"]]
    is_limited = device != "pytorch"
    allowed = default_limits(reference.spread)
    limits = asdict(allowed[precision]) if is_limited else None
    figures = {**found, "worst": worst, "pairs": len(pairs), "batch_shapes": shapes, "limits": limits}
    report = {"precisions": {}, "targets": {device: {precision: figures}}}
    if is_limited and (broken := violations(report, allowed)):
        raise CheckFailed("; ".join(broken), figures)
    return figures


def _environment(precision: str) -> Environment:
    """Without this variable TensorRT computes fp32 in TF32, and our code refuses it."""
    return {NO_TF32: "0"} if precision == "fp32" else {}
