"""An ELECTRA whose embeddings are narrower than its layers is exported in every precision for CPUs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from cappy_bench.make_checkpoint import make_family
from cappy_engine import Scorer
from cappy_engine.errors import GraphError
from cappy_engine.options import Precision
from cappy_export import ExportOptions, export
from cappy_export.proof.pairs import default_pairs
from tests.support.exported import made_once

pytestmark = pytest.mark.slow

PRECISIONS: dict[Precision, str] = {"fp32": "model.onnx", "bf16": "model_bf16.onnx", "int8": "model_quantized.onnx"}
PAIRS = default_pairs()[::15]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a checkpoint in the form of electra-small: word embeddings of 16, layers of 32. It is read-only."""

    def make(folder: Path) -> None:
        make_family(folder, "ms-marco-electra-base", is_tiny=True)
        published = json.loads((folder / "config.json").read_text())
        torch.manual_seed(0)
        model = ElectraForSequenceClassification(ElectraConfig(**{**published, "embedding_size": 16}))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, 0, 0.3)
        model.save_pretrained(folder)

    return made_once(tmp_path_factory, "narrow-electra", make)


@pytest.fixture(scope="module")
def bundle(narrow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        export(narrow, folder, ExportOptions(precisions=tuple(PRECISIONS)))

    return made_once(tmp_path_factory, "narrow-electra-bundle", make)


def torch_scores(checkpoint: Path) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        inputs = [tokenizer([pair], truncation=True, max_length=512, return_tensors="pt") for pair in PAIRS]
        return [model(**found).logits[0, 0].item() for found in inputs]


def test_every_precision_is_written_without_padding_and_scores_as_pytorch_does(narrow: Path, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {name: graph["unpadded"] for name, graph in manifest["graphs"].items()} == dict.fromkeys(PRECISIONS, True)
    assert manifest["graphs"]["int8"]["products_in_fp32"] == []
    wanted = torch_scores(narrow)
    assert np.std(wanted) > 0.05
    found = {}
    for precision in PRECISIONS:
        with Scorer.open(bundle, precision=precision, device="cpu") as scorer:
            found[precision] = scorer.score(PAIRS)
            np.testing.assert_allclose([scorer.score([pair])[0] for pair in PAIRS], found[precision], atol=1e-5)
    np.testing.assert_allclose(found["fp32"], wanted, rtol=0, atol=1e-4)
    for precision in ("bf16", "int8"):
        assert np.corrcoef(found[precision], wanted)[0, 1] > 0.97


def test_the_projection_of_embeddings_is_a_product_in_8_bits(bundle: Path) -> None:
    graph = onnx.load(str(bundle / "onnx" / PRECISIONS["int8"]), load_external_data=False).graph
    kinds = {node.name: node.op_type for node in graph.node}
    assert kinds["embeddings/project"] == "Linear"
    assert kinds["head/dense"] == kinds["logits"] == "Gemm"


def test_models_for_gpus_are_not_written(narrow: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GraphError, match=r"models for cuda are written for BERT and RoBERTa with .*; .* has model_type electra"
    ):
        export(narrow, tmp_path / "bundle", ExportOptions(precisions=("fp32",), targets=("cuda",)))
