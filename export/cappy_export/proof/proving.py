"""Prove a bundle: score the parity pairs with each of its models, and compare with PyTorch's scores.

Models for GPUs are run on the CPU provider, with stand-ins for the operators that it lacks, and with fp16's rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from cappy_engine.batching import Grouping, Scores
from cappy_engine.bundle import open_bundle
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.options import Precision, ScorerOptions
from cappy_engine.pairs import Pair
from cappy_engine.scorer import Scorer
from cappy_engine.session import open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.gpu_models import runnable_on_cpu
from cappy_export.manifest import machine
from cappy_export.options import Say
from cappy_export.proof.limits import Limits
from cappy_export.proof.parity import describe_pairs, measure, require_same_token_counts, score_in_shapes
from cappy_export.proof.reference import Reference

MEANINGFUL_STD = 0.01
"""Scores that vary less hide errors: any model would be near them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proof:
    """Hold what a bundle is proven with: the pairs, their `name`, PyTorch's scores of them, and the limits."""

    name: str
    pairs: Sequence[Pair]
    reference: Reference
    limits: Mapping[str, Limits]


def prove(folder: Path, models: Mapping[str, Sequence[str]], proof: Proof, say: Say) -> dict[str, Any]:
    """Score the pairs with `models` (target to precisions) of the bundle in `folder`; return the parity report.

    >>> prove(Path("my-bundle"), {"cpu": ["fp32"]}, proof, print)["precisions"]["fp32"]["max_error"]

    Raises ExportError where the engine tokenises a pair unlike transformers; limits are checked by `parity.require`.
    """
    rows: dict[str, dict[str, Any]] = {target: {} for target in models}
    for target, precisions in models.items():
        for precision in precisions:
            where = "" if target == "cpu" else f" of {target}, on the CPU provider"
            say(f"scoring {len(proof.pairs)} pairs in {precision}{where}")
            rows[target][precision] = _measure(folder, target, precision, proof)
    facts = describe_pairs(proof.pairs, proof.reference, proof.name)
    if facts["score_std"] < MEANINGFUL_STD:
        log.warning("the scores hardly vary (standard deviation %.2g): parity says little here", facts["score_std"])
    if not facts["truncated"]:
        log.warning("none of the pairs of %s is long enough to be truncated: that is not proven here", proof.name)
    report = {
        "reference": proof.reference.description,
        "machine": machine(),
        "pairs": facts,
        "precisions": rows.pop("cpu"),
    }
    return {**report, "targets": rows} if rows else report


def _measure(folder: Path, target: str, precision: str, proof: Proof) -> dict[str, Any]:
    """Measure one model's parity: a row of the report. Where kernels run, the operators' functions are measured too."""
    with _open_for_proof(folder, target, precision) as scorer:
        scored, shapes = score_in_shapes(scorer, proof.pairs)
        kernels, grouping = scorer.info.kernels if target == "cpu" else "", scorer.dispatcher.grouping
    require_same_token_counts(scored, proof.reference, proof.pairs)
    row = {
        **_compared(proof, scored.scores),
        "batch_shapes": shapes,
        "limits": dataclasses.asdict(proof.limits[precision]),
    }
    if kernels:
        row["kernels"] = kernels
    if kernels and not kernels.startswith("none"):
        with _open_bare(folder, target, precision, grouping) as scorer:
            plain, _ = score_in_shapes(scorer, proof.pairs)
        difference = float(np.abs(scored.scores - plain.scores).max())
        row["without_kernels"] = {**_compared(proof, plain.scores), "max_difference": difference}
    return row


def _compared(proof: Proof, scores: Scores) -> dict[str, Any]:
    return measure(proof.reference.scores, scores, proof.pairs, proof.reference.token_counts)


@contextlib.contextmanager
def _open_for_proof(folder: Path, target: str, precision: str) -> Iterator[Scorer]:
    """Open a scorer on the CPU for any model of the bundle in `folder`."""
    if target == "cpu":
        with Scorer.open_with(folder, ScorerOptions(device="cpu", precision=cast(Precision, precision))) as scorer:
            yield scorer
        return
    with _open_bare(folder, target, precision, Grouping(512)) as scorer:
        yield scorer


@contextlib.contextmanager
def _open_bare(folder: Path, target: str, precision: str, grouping: Grouping) -> Iterator[Scorer]:
    """Open a scorer on ONNX Runtime's own operators for the CPU, and nothing else."""
    bundle = open_bundle(folder)
    bundle.check_model(precision, target)
    with tempfile.TemporaryDirectory() as temporary:
        model = bundle.model(precision, target)
        if target != "cpu":
            model = runnable_on_cpu(model, target, Path(temporary))
        session, pad_token_id = open_session(model, threads=usable_cores()), bundle.manifest.pad_token_id
        dispatcher = Dispatcher(session, grouping, pad_token_id=pad_token_id)
        tokenizer = PairTokenizer.from_file(bundle.file("tokenizer.json"), max_length=bundle.manifest.max_length)
        with Scorer(tokenizer, dispatcher) as scorer:
            yield scorer
