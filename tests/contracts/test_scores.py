"""A bundle's scores are PyTorch's: exactly in fp32, closely in the other precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy_engine import Scorer
from cappy_engine.batching import Scores
from cappy_engine.options import Precision
from tests.support.places import parity_pairs

TOLERANCE = 1e-5
FEW = parity_pairs()[::6]


@pytest.fixture(scope="module")
def torch_scores(checkpoint: Path) -> Scores:
    """Score FEW with transformers itself, one pair at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    encode = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        # A list of one pair: `encode(instruction, "")` would drop the empty response and its separators.
        inputs = [encode([pair], truncation=True, max_length=512, return_tensors="pt") for pair in FEW]
        return np.array([float(model(**row).logits[0, 0]) for row in inputs], dtype=np.float32)


def test_fp32_scores_are_those_of_pytorch(bundle: Path, torch_scores: Scores) -> None:
    with Scorer.open(bundle, device="cpu", precision="fp32") as opened:
        scores = opened.score(FEW)
    assert scores.dtype == np.float32
    assert float(torch_scores.std()) > 0.1  # or any scores would do
    np.testing.assert_allclose(scores, torch_scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("int8", 0.2)])
def test_other_precisions_are_close_to_pytorch_but_not_the_same_model(
    bundle: Path, torch_scores: Scores, precision: Precision, tolerance: float
) -> None:
    with Scorer.open(bundle, device="cpu", precision=precision) as opened:
        errors = np.abs(opened.score(FEW) - torch_scores)
    assert TOLERANCE < errors.max() < tolerance
