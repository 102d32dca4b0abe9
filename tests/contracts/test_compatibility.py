"""Other tools load a bundle as it is and give our scores: optimum, sentence-transformers, transformers' pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForSequenceClassification
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, pipeline

from cappy_engine import Scorer
from cappy_engine.options import Precision
from cappy_export.proof.pairs import default_pairs

PAIRS = default_pairs()[:60] + default_pairs()[-8:]
FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_quantized.onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", FILES)
def test_optimum_gives_our_scores(bundle: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ours are without kernels: with them, a last bit of a scale moves the rounding of values between two steps."""
    monkeypatch.setenv("CAPPY_KERNELS", "none")
    model = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name=FILES[precision])
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    found = [
        model(**tokenizer([pair], truncation=True, max_length=512, return_tensors="pt")).logits[0, 0].item()
        for pair in PAIRS
    ]
    with Scorer.open(bundle, precision=precision, max_batch_tokens=1) as scorer:
        np.testing.assert_allclose(found, scorer.score(PAIRS), atol=1e-5)


def test_optimum_takes_fp32_where_no_file_is_named(bundle: Path) -> None:
    model = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx")
    assert Path(model.path).name == "model.onnx"
    assert model.config.problem_type == "regression"


def test_sentence_transformers_gives_our_scores_without_being_told_of_an_activation(bundle: Path) -> None:
    model = CrossEncoder(str(bundle), backend="onnx", model_kwargs={"file_name": "onnx/model.onnx"}, device="cpu")
    assert isinstance(model.activation_fn, torch.nn.Identity)
    found = model.predict(PAIRS)
    with Scorer.open(bundle, precision="fp32") as scorer:
        np.testing.assert_allclose(found, scorer.score(PAIRS), atol=1e-5)


def test_the_transformers_pipeline_gives_our_raw_scores(bundle: Path) -> None:
    model = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(bundle))
    pairs = [pair for pair in PAIRS if pair[1]]  # a text_pair of "" is no pair to transformers
    found = [classify({"text": first, "text_pair": second}, truncation=True)["score"] for first, second in pairs]
    with Scorer.open(bundle, precision="fp32") as scorer:
        np.testing.assert_allclose(found, scorer.score(pairs), atol=1e-5)
