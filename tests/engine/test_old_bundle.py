"""A bundle that was exported once keeps loading, and keeps its scores: a tiny one is committed, and never renewed."""

from __future__ import annotations

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.bundle import TARGETS, open_bundle
from cappy_engine.canary import read_canary
from cappy_engine.options import Precision
from tests.support.bundles import read_manifest
from tests.support.places import TINY, TINY_PRECISIONS

PAIRS = [
    ("Is the sky blue?", "Yes"),
    ("Is the sky blue?", "No"),
    ("Name a fruit.", "A pear."),
    ("", ""),
    ("Quelle est la capitale de la France ?", "Paris, naturellement: 巴黎 🗼."),
    ("The sky is blue, and so on. " * 200, "Yes"),
]
TOKENS = [15, 15, 16, 4, 50, 512]
SCORES = {
    "fp32": [0.7922133, 0.8238672, 0.6654299, 2.5418873, 0.5266197, 0.9189559],
    "fp16": [0.7953662, 0.8257676, 0.6672242, 2.5435891, 0.5294890, 0.9202332],
    "int8": [0.8011372, 0.8236747, 0.6665281, 2.5555668, 0.5337679, 0.9144782],
}
"""As they were on the day of the export."""
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-3}
"""float32's rounding differs between CPUs; it can move a value to the next step of fp16, or of int8's activations."""
MOST_BYTES = 500_000


def test_its_manifest_has_schema_version_1() -> None:
    document = read_manifest(TINY)
    assert document["schema_version"] == 1
    assert document["versions"]["cappy-engine"] == "0.1.0"


@pytest.mark.parametrize("precision", TINY_PRECISIONS)
def test_its_scores_are_what_they_were(precision: Precision) -> None:
    with Scorer.open(TINY, device="cpu", precision=precision) as scorer:
        scored = scorer.score_pairs(PAIRS)
    assert scored.token_counts.tolist() == TOKENS
    assert scored.truncated.tolist() == [False] * 5 + [True]
    np.testing.assert_allclose(scored.scores, SCORES[precision], rtol=0, atol=TOLERANCE[precision])


PRECISIONS = {**TARGETS, "cpu": TINY_PRECISIONS}


@pytest.mark.parametrize(("target", "precision"), [(name, each) for name, all_ in PRECISIONS.items() for each in all_])
def test_it_has_every_model_of_every_target_byte_by_byte(target: str, precision: str) -> None:
    bundle = open_bundle(TINY)
    assert bundle.manifest.precisions_for(target) == tuple(PRECISIONS[target])
    bundle.check_model(precision, target)


@pytest.mark.parametrize(
    ("target", "precision"), [(name, each) for name in ("cuda", "tensorrt") for each in TARGETS[name]]
)
def test_it_has_a_canary_for_every_model_of_a_gpu(target: str, precision: str) -> None:
    bundle = open_bundle(TINY)
    canary = read_canary(bundle.manifest.document, target, precision)
    assert len(canary.scores) > 3
    assert bundle.manifest.max_length in canary.pairs.lengths


def test_its_buckets_end_at_its_longest_pair() -> None:
    manifest = open_bundle(TINY).manifest
    assert manifest.buckets[-1] == manifest.max_length == 512


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= MOST_BYTES
