"""The lines of docs/migration.md: other tools' and ours give the same scores of the same checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastembed.common.model_description import ModelSource
from fastembed.rerank.cross_encoder import TextCrossEncoder
from sentence_transformers import CrossEncoder

from cappy_bench.make_checkpoint import make_family
from cappy_engine import Scorer
from cappy_export import ExportOptions, export
from cappy_export.proof.pairs import default_pairs
from tests.support.exported import made_once
from tests.support.pages import blocks

pytestmark = pytest.mark.slow

PAGE = "docs/migration.md"
NAMED = Path("cross-encoder", "ms-marco-MiniLM-L6-v2")
"""The checkpoint that the page names. A folder of this name in the current one is taken before the hub's."""
RAW, SIGMOID = "ms-marco-MiniLM-L6-v2", "bge-reranker-base"
"""Rerankers whose configs name an activation, the identity, and name none."""
LONG = ("How many people live in Berlin? " * 90, "Berlin is well known for its museums. " * 90)
PAIRS = [*default_pairs()[::30], LONG]


def exported(factory: pytest.TempPathFactory, family: str) -> Path:
    """Give a folder with a tiny checkpoint of the family under the page's name, and its bundle `reranker`."""

    def make(folder: Path) -> None:
        make_family(folder / NAMED, family, is_tiny=True)
        export(folder / NAMED, folder / "reranker", ExportOptions(precisions=("fp32",)))

    return made_once(factory, f"migration-{family}", make)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, RAW)


def run_lines(beginning: str) -> dict[str, Any]:
    """Run the script of the page that begins so; what its names stand for then."""
    (text,) = [block.text for block in blocks(PAGE, "python") if block.text.startswith(beginning)]
    names: dict[str, Any] = {}
    exec(compile(text, PAGE, "exec"), names)
    return names


def ours_behind(beginning: str) -> dict[str, Any]:
    """Run our script, which stands behind the one that begins so."""
    texts = [block.text for block in blocks(PAGE, "python")]
    (place,) = [place for place, text in enumerate(texts) if text.startswith(beginning)]
    assert texts[place + 1].startswith("from cappy_engine import Scorer")
    names: dict[str, Any] = {}
    exec(compile(texts[place + 1], PAGE, "exec"), names)
    return names


def test_the_lines_for_sentence_transformers_give_its_scores_and_its_best_passage(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(raw)
    theirs = run_lines("from sentence_transformers ")
    index, score, passage = capsys.readouterr().out.split(maxsplit=2)
    ours = ours_behind("from sentence_transformers ")
    found = capsys.readouterr().out.split(maxsplit=2)
    np.testing.assert_allclose(ours["scores"], theirs["scores"], rtol=0, atol=1e-4)
    assert (found[0], found[2]) == (index, passage)
    assert float(found[1]) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("family", [RAW, SIGMOID])
def test_scores_are_those_of_a_cross_encoder_with_the_activation_that_the_page_tells(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = exported(tmp_path_factory, family)
    model = CrossEncoder(str(folder / NAMED), device="cpu")
    with Scorer.open(folder / "reranker") as scorer:
        found = scorer.score(PAIRS, activation="sigmoid" if family == SIGMOID else "identity")
        scored = scorer.score_pairs(PAIRS)
        one = scorer.score(PAIRS[:1])[0]
    theirs = model.predict(PAIRS)
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4)
    assert np.std(theirs) > 1e-3
    assert scored.truncated[-1]
    if family == RAW:
        assert model.predict(PAIRS[0]) == pytest.approx(one, abs=1e-4)


def test_the_lines_for_fastembed_give_its_scores(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw)
    bundle = raw / "reranker"
    for path in [*bundle.glob("*.json"), bundle / "onnx" / "model.onnx"]:
        shutil.copyfile(path, tmp_path / path.name)
    TextCrossEncoder.add_custom_model("ours", sources=ModelSource(url="unused"), model_file="model.onnx")
    encoder = TextCrossEncoder("ours", specific_model_path=str(tmp_path), providers=["CPUExecutionProvider"])
    ours = ours_behind("from fastembed")
    theirs = list(encoder.rerank("Is the sky blue?", ["Yes", "No"]))
    np.testing.assert_allclose(ours["scores"], theirs, rtol=0, atol=1e-4)


def test_the_lines_for_flag_embedding_give_sigmoids(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw)
    scores = ours_behind("from FlagEmbedding ")["scores"]
    model = CrossEncoder(str(NAMED), device="cpu")
    expected = 1 / (1 + np.exp(-model.predict([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
