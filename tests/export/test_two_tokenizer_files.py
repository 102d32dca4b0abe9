"""A tokenizer whose tokenizer.json and tokenizer_config.json say different things of letters, beside a newer config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cappy_bench.make_checkpoint import make_family
from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.fast_tokenizer import load_tokenizer
from tests.support.checkpoints import edit

BERT, DEBERTA = "ms-marco-MiniLM-L6-v2", "mxbai-rerank-base-v1"
TYPES = ["input_ids", "token_type_ids", "attention_mask"]


def saved_by_newer(folder: Path, family: str, told: dict[str, Any], normalizer: dict[str, Any]) -> Path:
    """Make a checkpoint whose config.json transformers 5 wrote, with changes in both files of its tokenizer.

    Keys that are told as None are left out, but for `strip_accents`.
    """
    make_family(folder, family, is_tiny=True)
    edit(folder / "config.json", lambda config: config.update(transformers_version="5.5.0"))

    def tell(config: dict[str, Any]) -> None:
        for key, value in told.items():
            config[key] = value
            if value is None and key != "strip_accents":
                del config[key]

    edit(folder / "tokenizer_config.json", tell)
    edit(folder / "tokenizer.json", lambda content: content["normalizer"].update(normalizer))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "told", "normalizer", "problem"),
    [
        (BERT, {"do_lower_case": False}, {}, "do_lower_case false"),
        (BERT, {"do_lower_case": False, "tokenizer_class": None}, {}, "do_lower_case false"),
        (BERT, {"strip_accents": False}, {}, "strip_accents false"),
        (BERT, {"strip_accents": None}, {"strip_accents": False}, "strip_accents null"),
        (BERT, {"tokenize_chinese_chars": False}, {}, "tokenize_chinese_chars false"),
        (BERT, {"do_lower_case": None}, {"lowercase": False}, "do_lower_case true, by default"),
        (DEBERTA, {"do_lower_case": True}, {}, "do_lower_case true"),
        (DEBERTA, {"do_lower_case": True, "tokenizer_class": None}, {}, "do_lower_case true"),
    ],
)
def test_files_that_read_letters_differently_are_refused(
    tmp_path: Path, family: str, told: dict[str, Any], normalizer: dict[str, Any], problem: str
) -> None:
    """transformers 5 follows tokenizer_config.json where it has a class that knows these keys."""
    folder = saved_by_newer(tmp_path / "made", family, told, normalizer)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json has {problem}, and its tokenizer\.json"):
        load_tokenizer(open_checkpoint(folder), max_length=512)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "told", "normalizer"),
    [
        (BERT, {}, {}),
        (BERT, {"do_lower_case": None}, {}),
        (BERT, {"do_lower_case": False, "strip_accents": None}, {"lowercase": False}),
        (BERT, {"strip_accents": False}, {"strip_accents": False}),
        (BERT, {"do_lower_case": False, "tokenizer_class": "TokenizersBackend"}, {}),
        (DEBERTA, {"do_lower_case": None, "tokenize_chinese_chars": True, "strip_accents": True}, {}),
    ],
)
def test_files_that_agree_are_taken_and_keys_that_nobody_reads_too(
    tmp_path: Path, family: str, told: dict[str, Any], normalizer: dict[str, Any]
) -> None:
    folder = saved_by_newer(tmp_path / "made", family, {**told, "model_input_names": TYPES}, normalizer)
    load_tokenizer(open_checkpoint(folder), max_length=512)


@pytest.mark.slow
def test_the_class_in_config_json_counts_before_the_usual_one(tmp_path: Path) -> None:
    told = {"do_lower_case": False, "tokenizer_class": None, "model_input_names": TYPES}
    folder = saved_by_newer(tmp_path / "made", BERT, told, {})
    edit(folder / "config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"))
    load_tokenizer(open_checkpoint(folder), max_length=512)
