"""How long a bundle's pairs may be, and what an export says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.canary import read_canary
from cappy_export.options import ExportOptions
from cappy_export.pipeline import export


@pytest.mark.slow
def test_a_smaller_max_length_is_kept_in_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    canary = read_canary(export(checkpoint, tmp_path / "bundle", ExportOptions(max_length=64)), "cpu", "fp32")
    with Scorer.open(tmp_path / "bundle") as scorer:
        scored = scorer.score_pairs([("word " * 500, "yes")])
        assert canary.compare(scorer.score_encoded(canary.pairs).scores)[1] == ""
    assert scored.token_counts.tolist() == [canary.pairs.lengths.max()] == [64]
    assert scored.truncated.tolist() == [True]
    assert json.loads((tmp_path / "bundle" / "tokenizer_config.json").read_text())["model_max_length"] == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "note"),
    [
        (1024, "note: pairs are cut at 512 tokens, not at 1024: tiny and its tokenizer take no longer ones"),
        (512, None),
        (511, "note: pairs are cut at 511 tokens; tiny takes up to 512, with --max-length 512"),
    ],
)
def test_an_export_says_if_pairs_are_shorter_than_was_asked_or_could_be(
    checkpoint: Path, tmp_path: Path, length: int, note: str | None
) -> None:
    said: list[str] = []
    export(checkpoint, tmp_path / "bundle", ExportOptions(max_length=length), say=said.append)
    assert [text for text in said if "pairs are cut" in text] == ([] if note is None else [note])
