"""The pairs that parity is measured on: the package's, and the user's."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path

import pytest

from cappy_engine.errors import ExportError
from cappy_export.proof.pairs import MIN_PAIRS, default_pairs, read_pairs
from cappy_export.proof.parity import (
    candidate_groups,
)
from tests.support.places import ROOT


def test_default_pairs_are_many_and_of_many_kinds() -> None:
    pairs = default_pairs()
    assert len(pairs) >= MIN_PAIRS
    assert len(set(pairs)) == len(pairs)
    assert len(candidate_groups(pairs)) >= 60
    text = "".join(part for pair in pairs for part in pair)
    scripts = {unicodedata.name(character, "?").split()[0] for character in text if not character.isascii()}
    assert {"ARABIC", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN", "GREEK", "HANGUL", "HEBREW",
            "HIRAGANA", "TAMIL", "THAI", "FULLWIDTH", "COMBINING", "EMOJI", "REGIONAL"} <= scripts  # fmt: skip
    for sample in ("\0", "</s>", "<mask>", "\u200d", "def ", "\t", "SELECT"):
        assert sample in text, sample
    assert ("", "") in pairs
    assert any(instruction.startswith("\n") for instruction, _ in pairs)


def test_the_least_number_of_pairs_is_that_of_the_page() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert f"takes your pairs instead, {MIN_PAIRS} different ones or more" in page


def test_the_users_pairs_are_read_and_too_few_or_bad_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"instruction": "q", "response": str(number), "label": 1} for number in range(MIN_PAIRS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(path) == [("q", str(number)) for number in range(MIN_PAIRS)]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_pairs(tmp_path / "pairs.jsonl.gz") == read_pairs(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(ExportError, match=f"has {MIN_PAIRS - 1} different pairs; parity needs at least {MIN_PAIRS}"):
        read_pairs(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[1:], *rows[1:]]))
    with pytest.raises(ExportError, match=f"has {MIN_PAIRS - 1} different pairs; parity needs at least {MIN_PAIRS}"):
        read_pairs(path)
    path.write_text('{"instruction": "q"}\n')
    with pytest.raises(ExportError, match=r"pairs\.jsonl, line 1: has no field 'response'"):
        read_pairs(path)
    with pytest.raises(ExportError, match="cannot be read"):
        read_pairs(tmp_path / "missing.jsonl")
