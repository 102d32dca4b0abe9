"""Load a checkpoint's tokenizer. Check that the model has a row for every id and token type.

Tokenizers that transformers 5 saved are taken from their tokenizer.json as it is: transformers 4 knows neither their
class nor the form of some keys.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, __version__
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.utils import is_sentencepiece_available

from cappy_engine.bundle import MIN_LENGTH
from cappy_engine.errors import CheckpointError
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.checkpoints.checkpoint import Checkpoint
from cappy_export.checkpoints.config import COUNTS_FROM_PADDING, max_positions, read_json
from cappy_export.checkpoints.cross_encoder import is_cross_encoder
from cappy_export.checkpoints.hub import TOKENIZER_FILES, VOCABULARIES, refuse_outside
from cappy_export.checkpoints.models import model_config
from cappy_export.checkpoints.naming import listed, shown
from cappy_export.checkpoints.refusals import refusing
from cappy_export.checkpoints.tokenizer_config import (
    READ,
    check_settings,
    has_chat_template,
    read_special_tokens,
    read_tokenizer_config,
)

PROBES = (
    ("a", "b"),
    ("Is the Sky BLUE?\n", " Yes,  it's 100% naïve: Ünïcode, e\u0301."),
    ("東京 and 天气 \u200d🙂", "\tif x == 1: return [0]\r\n"),
)
"""Pairs with what tokenizers treat in different ways: case, accents, spaces, controls, CJK, emoji."""

LEAST_PART = 0.8
"""A smaller part of the table of words than this is odd: tables are rounded up, to a multiple of 64 or 128 mostly."""

TYPED = tuple(
    f"{name}Tokenizer" for name in "Bert Deberta DebertaV2 Electra ConvBert MobileBert LayoutLM MegatronBert".split()
)
"""Classes that give token types in transformers 5 without model_input_names. Others did so in transformers 4 alone.

Of ALBERT and six more that was a fault (huggingface/transformers#48128): what a model was trained with is not known.
"""

_AS_BERT: Mapping[str, bool | None] = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
REBUILT: Mapping[str, Mapping[str, bool | None]] = {
    **dict.fromkeys(("Bert", "DistilBert", "Electra", "MobileBert", "MPNet", "Funnel"), _AS_BERT),
    "Albert": {"do_lower_case": True, "keep_accents": False},
    "DebertaV2": {"do_lower_case": False},
}
"""Classes that transformers 5 builds anew, whatever normalizer is in tokenizer.json, by these keys of
tokenizer_config.json or their defaults. Where `strip_accents` is None, accents go where upper case goes."""
LETTERS = {
    "do_lower_case": ("A", "a"),
    "strip_accents": ("é", "e"),
    "keep_accents": ("é", "é"),
    "tokenize_chinese_chars": ("a東b", "a 東 b"),
}
"""For each of the keys a text, and what it becomes where the key is true."""


def load_tokenizer(checkpoint: Checkpoint, *, max_length: int) -> PreTrainedTokenizerBase:
    """Load the checkpoint's fast tokenizer, with `model_max_length` set to at most `max_length`.

    >>> load_tokenizer(open_checkpoint("export/cappy_mini/checkpoint"), max_length=512).model_max_length
    512

    Raises CheckpointError if there is none, if it truncates or pads on the left, or if it makes ids that the model has
    no row for.
    """
    if not any((checkpoint.folder / name).is_file() for name in VOCABULARIES):
        found = listed(sorted(entry.name for entry in checkpoint.folder.iterdir()), at_most=20)
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer: needed is one of {', '.join(VOCABULARIES)}; found {found}; save the "
            "one that the model was trained with there: tokenizer.save_pretrained(folder)"
        )
    with refusing(f"{checkpoint.name} has no usable tokenizer"):
        tokenizer = _load(checkpoint)
        if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            raise CheckpointError(
                f"tokenizer.json of {checkpoint.name} has a dropout of {dropout}: it cuts a text in other tokens each "
                "time; set it to null"
            )
        sides = (tokenizer.truncation_side, tokenizer.padding_side)
        if not tokenizer.is_fast or sides != ("right", "right") or tokenizer.pad_token_id is None:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.name} must be a fast one with a padding token that truncates and pads "
                f"on the right; found {type(tokenizer).__name__}, padding token {tokenizer.pad_token!r}, sides {sides}"
            )
        check_tables(checkpoint, tokenizer)
    limits = [max_length, max_positions(checkpoint.config)]
    if isinstance(tokenizer.model_max_length, (int, float)):
        limits.append(int(min(tokenizer.model_max_length, max_length)))  # which may be infinite
    tokenizer.model_max_length = min(limits)
    least = max(tokenizer.num_special_tokens_to_add(pair=True) + 2, MIN_LENGTH)
    if tokenizer.model_max_length < least:
        raise CheckpointError(
            f"max_length {tokenizer.model_max_length} leaves a pair no text; at least {least} is needed"
        )
    return tokenizer


def check_tables(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CheckpointError unless the model's tables of embeddings have a row for every id.

    >>> check_tables(opened, load_tokenizer(opened, max_length=512))

    It checks the ids of the vocabulary, of added tokens, and of the tokens around a pair; the types of tokens; and the
    padding's id where positions are counted from it.
    """
    name, model_type = checkpoint.name, checkpoint.config["model_type"]
    config = model_config(checkpoint.config)
    rows = int(config.vocab_size)
    pair = tokenizer("a", "b", return_token_type_ids=True)
    ids = {number: token for token, number in tokenizer.get_vocab().items()}
    ids |= {number: f"id {number}" for number in pair["input_ids"] if number not in ids}
    beyond = [token for number, token in sorted(ids.items()) if number >= rows]
    if beyond:
        raise CheckpointError(
            f"the tokenizer of {name} makes ids up to {max(ids)}, and the model's table of words has {rows} rows (0 to "
            f"{rows - 1}): there is none for {listed(beyond)}; remove these tokens, or train the model after "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    types, known_types = max(pair["token_type_ids"]), int(getattr(config, "type_vocab_size", 0) or 0)
    if "token_type_ids" in tokenizer.model_input_names and 0 < known_types <= types:
        raise CheckpointError(
            f"the tokenizer of {name} makes token types up to {types}, and the model's table of types has "
            f"{known_types} rows; take the tokenizer that the model was trained with"
        )
    if "token_type_ids" not in tokenizer.model_input_names and 0 < types < known_types:
        raise CheckpointError(
            f"the tokenizer of {name} gives the second text the token type {types}, and its model_input_names leave "
            "token_type_ids out, so that transformers takes 0 for it; add token_type_ids to model_input_names in "
            "tokenizer_config.json if the model was trained with them, else take the types out of tokenizer.json"
        )
    if config.pad_token_id is not None and config.pad_token_id >= rows:
        raise CheckpointError(
            f"config.json of {name} has the pad_token_id {config.pad_token_id}, and the model's table of words has "
            f"{rows} rows; write the tokenizer's, {tokenizer.pad_token_id}"
        )
    if model_type in COUNTS_FROM_PADDING and config.pad_token_id != tokenizer.pad_token_id:
        raise CheckpointError(
            f"{name} counts positions from the pad_token_id {config.pad_token_id} of its config.json, and its "
            f"tokenizer pads with {tokenizer.pad_token_id} ({tokenizer.pad_token!r}); make them the same, as they "
            "were in training"
        )


def doubts_of(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say why scores may be others than where the model was trained; empty if nothing speaks for it.

    No parity check could see it: the tokenizer is another model's, or other tools put texts into a template.

    >>> doubts_of(opened, load_tokenizer(opened, max_length=512))
    []
    """
    doubts = []
    rows, highest = int(model_config(checkpoint.config).vocab_size), max(tokenizer.get_vocab().values())
    if highest + 1 < LEAST_PART * rows:
        doubts.append(
            f"note: the tokenizer of {checkpoint.name} makes ids up to {highest} of {rows} rows in the model's table "
            "of words; is it the one that the model was trained with? With another all scores are wrong"
        )
    if has_chat_template(checkpoint.folder) and not is_cross_encoder(checkpoint.folder):
        doubts.append(
            f"note: {checkpoint.name} has a chat template: sentence-transformers writes a pair as messages by it, from "
            "5.4 on, and a bundle scores texts as they are, as transformers does"
        )
    return doubts


def _check_vocabulary(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless there is what reading the vocabulary needs: its merges, or a package."""
    vocabularies = [name for name in VOCABULARIES if (checkpoint.folder / name).is_file()]
    if vocabularies == ["vocab.json"] and not (checkpoint.folder / "merges.txt").is_file():
        raise CheckpointError(
            f"{checkpoint.name} has a vocab.json without its merges.txt; save the tokenizer that the model was trained "
            "with there: tokenizer.save_pretrained(folder)"
        )
    if all(name.endswith(".model") for name in vocabularies) and not is_sentencepiece_available():
        raise CheckpointError(
            f"the tokenizer of {checkpoint.name} is in {listed(vocabularies)} alone, which transformers reads with "
            "another package: pip install sentencepiece; or save it as a tokenizer.json where that is installed"
        )


def _load(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer from copies of its files. The copy of tokenizer_config.json holds only known keys."""
    from_newer = False

    def translate(found: dict[str, Any]) -> dict[str, Any]:
        nonlocal from_newer
        from_newer = _is_from_newer(found, checkpoint)
        check_settings(found, checkpoint.folder / "tokenizer_config.json")
        return _translated(found, checkpoint) if from_newer else found

    with tempfile.TemporaryDirectory() as folder:
        for file in TOKENIZER_FILES:
            refuse_outside(checkpoint.folder, checkpoint.name, file)
            if (checkpoint.folder / file).is_file() and file not in READ:
                shutil.copyfile(checkpoint.folder / file, Path(folder, file))
        config = {key: value for key, value in checkpoint.config.items() if key != "tokenizer_class"}
        told = read_tokenizer_config(checkpoint.folder, checkpoint.name, checkpoint.config, translate=translate)
        if "added_tokens_decoder" not in told:  # else transformers does not read it
            special = read_special_tokens(checkpoint.folder / "special_tokens_map.json")
            Path(folder, "special_tokens_map.json").write_text(json.dumps(special))
        _check_vocabulary(checkpoint)
        told.setdefault("tokenizer_class", checkpoint.config.get("tokenizer_class"))
        Path(folder, "config.json").write_text(json.dumps(config))
        Path(folder, "tokenizer_config.json").write_text(json.dumps(told))
        # False: transformers suspects every vocabulary over 100,000 of a fault of Mistral's, and warns.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True, fix_mistral_regex=False
        )
        tokenizer.init_kwargs.pop("fix_mistral_regex", None)
        if from_newer:
            _require_own_ids(checkpoint, tokenizer, Path(folder, "tokenizer.json"))
            _require_told_letters(checkpoint, tokenizer)
    return tokenizer


def _is_from_newer(found: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Tell whether transformers 5 or later saved this tokenizer."""
    version = read_json(checkpoint.folder / "config.json").get("transformers_version")
    major = version.partition(".")[0] if isinstance(version, str) else ""
    return (
        found.get("tokenizer_class") == "TokenizersBackend"
        or "backend" in found
        or isinstance(found.get("extra_special_tokens"), list)
        or (major.isdigit() and int(major) >= 5)
    )


def _translated(found: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Write a config of transformers 5 as transformers 4 reads it: the file tokenizer.json says all but the names."""
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{checkpoint.name} was saved by transformers 5 without a tokenizer.json; load its tokenizer there and "
            "save it with tokenizer.backend_tokenizer.save('tokenizer.json')"
        )
    translated = {**found, "tokenizer_class": "PreTrainedTokenizerFast"}
    if str(found.get("tokenizer_class") or TYPED[0]).removesuffix("Fast") not in TYPED:
        translated.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = translated.get("extra_special_tokens")
    if isinstance(extra, list):
        del translated["extra_special_tokens"]
        if translated.setdefault("additional_special_tokens", extra) != extra:
            raise CheckpointError(
                f"{checkpoint.name} was saved by transformers 5: extra_special_tokens and additional_special_tokens "
                "of its tokenizer_config.json differ; remove one of them"
            )
    return translated


def _require_own_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise CheckpointError unless transformers makes the ids that the tokenizer.json itself gives."""
    own = PairTokenizer.from_file(path, max_length=1_000_000)
    special = " ".join(f"{token} x" for token in tokenizer.all_special_tokens)
    for pair in (*PROBES, (special, special)):
        expected, found = own.encode([pair]).token_ids[0].tolist(), tokenizer([pair])["input_ids"][0]
        if expected != found:
            raise CheckpointError(
                f"the tokenizer of {checkpoint.name} was saved by transformers 5, and transformers {__version__} reads "
                f"it unlike its tokenizer.json: {shown(repr(pair))} becomes {shown(found)} instead of "
                f"{shown(expected)}; load it with transformers 5 and save it again, so that its files agree"
            )


def _require_told_letters(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CheckpointError unless tokenizer.json treats letters as tokenizer_config.json says, where both count."""
    path = checkpoint.folder / "tokenizer_config.json"
    found = read_json(path) if path.exists() else {}
    usual = [name for name in TOKENIZER_MAPPING_NAMES.get(checkpoint.config["model_type"], ()) if name]
    names = (found.get("tokenizer_class"), checkpoint.config.get("tokenizer_class"), *usual)
    name = str(next(filter(None, names), "")).removesuffix("Fast").removesuffix("Tokenizer")
    told = {key: found.get(key, default) for key, default in REBUILT.get(name, {}).items()}
    normalizer = tokenizer.backend_tokenizer.normalizer
    for key, value in told.items():
        text, changed = LETTERS[key]
        wanted = told["do_lower_case"] if key == "strip_accents" and value is None else value
        got = text if normalizer is None else normalizer.normalize_str(text).replace("▁", " ").strip()
        if isinstance(wanted, bool) and wanted != (unicodedata.normalize("NFC", got) == changed):
            by = "" if key in found else ", by default"
            raise CheckpointError(
                f"{path} has {key} {json.dumps(value)}{by}, and its tokenizer.json has it the other way; transformers "
                "5 follows the first: find out which file the model was trained with, correct the other, and export"
            )
