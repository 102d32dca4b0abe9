"""Read a checkpoint's `tokenizer_config.json`, reduced to what says how texts become tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import read_json, refuse_code
from cappy_export.checkpoints.hub import CHAT_TEMPLATE
from cappy_export.checkpoints.naming import shown

READ = ("tokenizer_config.json", "special_tokens_map.json")
"""The files of a tokenizer that are read here, reduced, and not copied."""

TOKENIZER_KEYS = frozenset(
    """tokenizer_class model_max_length max_len added_tokens_decoder additional_special_tokens extra_special_tokens
    add_prefix_space trim_offsets errors do_lower_case strip_accents tokenize_chinese_chars do_basic_tokenize
    never_split
    clean_up_tokenization_spaces padding_side truncation_side model_input_names legacy sp_model_kwargs keep_accents
    remove_space split_by_punct do_lower vocab_type""".split()
)
"""Keys of tokenizer_config.json that say how texts become tokens; special tokens (`..._token`) are kept as well."""

SPECIAL_LISTS = frozenset({"additional_special_tokens", "extra_special_tokens"})
"""Keys of special_tokens_map.json besides `..._token`."""

REFUSED_SETTINGS: Mapping[str, str] = {
    "split_special_tokens": "which the engine does not know; train and save the tokenizer without it",
    "from_slow": "by which transformers makes the tokenizer of vocab.txt and its like, whatever tokenizer.json says; "
    "remove the key if both make the same tokens, else remove tokenizer.json, too",
}
"""Keys that change tokens where they are true, with why, or what to do."""


def read_tokenizer_config(
    folder: Path, name: str, config: Mapping[str, Any], *, translate: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> dict[str, Any]:
    """Read `tokenizer_config.json`, if there is one, reduced to TOKENIZER_KEYS and special tokens.

    >>> read_tokenizer_config(Path("export/cappy_mini/checkpoint"), "cappy-mini", {})["pad_token"]
    '<pad>'

    `translate` changes it before it is reduced. Raises CheckpointError if it, or the model's `config`, names a class
    that is not a tokenizer.
    """
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.exists() else {}
    refuse_code(found, path)
    found = translate(found)
    kept = {key: value for key, value in found.items() if key in TOKENIZER_KEYS or key.endswith("_token")}
    _check_tokenizer_class(name, kept, config)
    return kept


def _check_tokenizer_class(name: str, *configs: Mapping[str, Any]) -> None:
    """Let the named class be a tokenizer: transformers would take any of its classes by this name."""
    known = {str(entry) for pair in TOKENIZER_MAPPING_NAMES.values() for entry in pair} | {"PreTrainedTokenizerFast"}
    for config in configs:
        found = config.get("tokenizer_class")
        if found is not None and not (isinstance(found, str) and {found, f"{found}Fast"} & known):
            raise CheckpointError(
                f"{name} names the tokenizer class {shown(repr(found))}, which transformers does not know"
            )


def check_settings(found: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for REFUSED_SETTINGS, and for a longest text that is not a number.

    >>> check_settings({"model_max_length": 512}, Path("tokenizer_config.json"))
    """
    for key, instead in REFUSED_SETTINGS.items():
        if found.get(key):
            raise CheckpointError(f"{path}: {key} is {shown(repr(found[key]))}, {instead}")
    for key in ("model_max_length", "max_len"):
        value = found.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if value is not None and not is_number:
            raise CheckpointError(f"{path}: {key!r} must be a number of tokens, or null, found {shown(repr(value))}")


def read_special_tokens(path: Path) -> dict[str, Any]:
    """Read special_tokens_map.json, if there is one. Only special tokens with a name of their own are kept.

    >>> read_special_tokens(Path("export/cappy_mini/checkpoint/special_tokens_map.json"))["pad_token"]
    '<pad>'

    transformers takes every key for an argument of the tokenizer: `vocab_file` would read any file of the user, which
    the bundle would then hold. Raises CheckpointError for a key that names a file or changes tokens.
    """
    found = read_json(path) if path.exists() else {}
    for key in found:
        if key.endswith("_file") or key in (TOKENIZER_KEYS - SPECIAL_LISTS) or key in REFUSED_SETTINGS:
            raise CheckpointError(f"{path}: {shown(repr(key))} is not a special token; remove the key")
    return {key: value for key, value in found.items() if key in SPECIAL_LISTS or key.endswith("_token")}


def has_chat_template(folder: Path) -> bool:
    """Tell whether the tokenizer has a chat template. With it, other tools write a pair as messages.

    >>> has_chat_template(Path("export/cappy_mini/checkpoint"))
    False
    """
    path = folder / "tokenizer_config.json"
    return (folder / CHAT_TEMPLATE).is_file() or bool(path.is_file() and read_json(path).get("chat_template"))
