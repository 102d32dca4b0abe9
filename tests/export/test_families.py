"""Checkpoints in the form of published ones: read whole, written directly, and scored as PyTorch scores them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cappy_bench.families import FAMILIES
from cappy_bench.make_checkpoint import make_family
from cappy_bench.studies.token_ids import compare, made_up_pairs
from cappy_engine import Scorer
from cappy_engine.session import open_session
from cappy_engine.tokenizer import PairTokenizer
from cappy_export import ExportOptions, export
from cappy_export.checkpoints.checkpoint import load_with_head, open_checkpoint
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
from cappy_export.graphs.build import build_graph
from cappy_export.proof.pairs import default_pairs
from tests.support.exported import made_once

KINDS = (
    "ms-marco-MiniLM-L6-v2",
    "bge-reranker-v2-m3",
    "gte-reranker-modernbert-base",
    "ms-marco-electra-base",
    "mxbai-rerank-base-v1",
)
"""One of each architecture, and of each kind of tokenizer."""
PAIRS = [pair for pair in default_pairs() if len(pair[0]) + len(pair[1]) < 1200][::40]
LONG = [("Is it so? " * 90, "It is, and so on. " * 90), ("Is it?", "It is, and so on. " * 150)]


@pytest.fixture(scope="module", params=KINDS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a tiny checkpoint in a published one's form. It is read-only."""
    family: str = request.param
    return made_once(tmp_path_factory, family, lambda folder: make_family(folder, family, is_tiny=True))


def torch_scores(checkpoint: Path, pairs: list[tuple[str, str]], max_length: int) -> list[float]:
    """What transformers alone makes of the checkpoint, one pair at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        inputs = [tokenizer([p], truncation=True, max_length=max_length, return_tensors="pt") for p in pairs]
        return [model(**found).logits[0, 0].item() for found in inputs]


def test_a_family_is_made_in_the_same_bytes_each_time(published: Path, tmp_path: Path) -> None:
    """So that a measurement on it comes back on another machine."""
    again = make_family(tmp_path / "again", published.name, is_tiny=True)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (published, again))
    assert first == second


@pytest.mark.slow
def test_a_published_form_is_written_directly_and_scores_as_in_pytorch(published: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(published)
    longest = load_tokenizer(opened, max_length=8192).model_max_length
    assert longest == FAMILIES[published.name].max_length
    _, facts = build_graph(opened, tmp_path / "model.onnx")
    assert facts == {"written_by": "cappy-export", "opset": 18, "unpadded": True}
    encoded = PairTokenizer.from_file(published / "tokenizer.json", max_length=longest).encode([*PAIRS, *LONG])
    assert encoded.lengths.max() == 512 if longest == 512 else encoded.lengths.max() > 512
    session = open_session(tmp_path / "model.onnx", threads=1)
    found = [
        session.run(
            {
                "input_ids": ids[None],
                "attention_mask": np.ones_like(ids)[None],
                "token_type_ids": types[None],
            }
        )[0]
        for ids, types in zip(encoded.token_ids, encoded.type_ids, strict=True)
    ]
    wanted = torch_scores(published, [*PAIRS, *LONG], longest)
    assert np.std(wanted) > 0.05
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_published_form_is_exported_with_parity_up_to_its_longest_pair(published: Path, tmp_path: Path) -> None:
    options = ExportOptions(precisions=("fp32", "bf16", "int8"), max_length=1024)
    manifest = export(published, tmp_path / "bundle", options)
    assert {name: graph["unpadded"] for name, graph in manifest["graphs"].items()} == dict.fromkeys(
        options.precisions, True
    )
    assert manifest["graphs"]["int8"]["products_in_fp32"] == []
    assert manifest["parity"]["pairs"]["longest"] == min(1024, FAMILIES[published.name].max_length)
    pairs = [*PAIRS, *LONG]
    wanted = torch_scores(published, pairs, manifest["model"]["max_length"])
    with Scorer.open(tmp_path / "bundle", precision="fp32", device="cpu") as scorer:
        np.testing.assert_allclose(scorer.score(pairs), wanted, rtol=0, atol=1e-4)
    with Scorer.open(tmp_path / "bundle", precision="int8", device="cpu") as scorer:
        together = scorer.score(pairs)
        np.testing.assert_allclose([scorer.score([pair])[0] for pair in pairs], together, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_training_drops_out_what_was_asked_for_and_nothing_else(published: Path) -> None:
    """In attention, too, and whatever the config's own rates are: 0.1 in most families, 0 in ModernBERT's."""
    opened = open_checkpoint(published)
    inputs = AutoTokenizer.from_pretrained(published)([LONG[0]], truncation=True, max_length=64, return_tensors="pt")
    rates = [name for name, value in opened.config.items() if "dropout" in name and isinstance(value, float)]
    for own, asked in ((0.1, 0.0), (0.0, 0.1)):
        config = {**opened.config, **dict.fromkeys(rates, own)}
        model, _ = load_with_head(dataclasses.replace(opened, config=config), dropout=asked)
        with torch.inference_mode():
            score = model(**inputs).logits.item()
            trained = {model.train()(**inputs).logits.item() for _ in range(3)}
            assert (trained == {score}) == (asked == 0)
        # ModernBERT's attention holds its rate as a number, beside its modules.
        numbers = {getattr(module, "attention_dropout", asked) for module in model.modules()}
        modules = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert numbers | modules == {asked}


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_token_ids_of_made_up_pairs_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    assert compare(family, tmp_path, 400, seed=1) == []


def test_made_up_pairs_hold_long_texts_special_tokens_and_all_planes() -> None:
    pairs = list(made_up_pairs(300, seed=1))
    texts = "".join(text for pair in pairs for text in pair)
    assert max(len(first) for first, _ in pairs) > 2000
    assert "[MASK]" in texts
    assert "</s>" in texts
    assert max(texts) > "\U00010000"
    assert pairs == list(made_up_pairs(300, seed=1))
