"""Read what sentence-transformers, from 5.4 on, keeps of a CrossEncoder beside its config.json.

That may be the activation, a prompt for every instruction, and modules behind the model. The exporter has neither of
the last two, and no parity check could see that they are missing: PyTorch's reference has only config.json, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import read_any_json, read_json
from cappy_export.checkpoints.hub import CROSS_ENCODER_FILES
from cappy_export.checkpoints.naming import listed, shown

MODULES, SAVED = CROSS_ENCODER_FILES


def read_cross_encoder(folder: Path) -> dict[str, Any]:
    """Read the config_sentence_transformers.json in a checkpoint's folder; empty unless it is a CrossEncoder's.

    >>> read_cross_encoder(Path("export/cappy_mini/checkpoint"))
    {}

    sentence-transformers reads it only beside a modules.json. Raises CheckpointError for scores that come from more
    than the model in config.json and the texts of a pair.
    """
    if not (folder / MODULES).is_file() or not (folder / SAVED).is_file():
        return {}
    found = read_json(folder / SAVED)
    if found.get("model_type") != "CrossEncoder":
        return {}
    _check_modules(folder / MODULES)
    _check_prompt(found, folder / SAVED)
    return found


def _check_modules(path: Path) -> None:
    """Raise CheckpointError unless the model in config.json is all there is."""
    modules = read_any_json(path)
    kinds = [
        str(module.get("type")).rpartition(".")[2] if isinstance(module, Mapping) else repr(module)
        for module in (modules if isinstance(modules, list) else [modules])
    ]
    if kinds[:1] != ["Transformer"] or len(kinds) > 1:
        raise CheckpointError(
            f"{path}: the score comes from {listed(kinds[1:] or kinds)} behind the model, modules of "
            "sentence-transformers, which are not exported; needed is a model ...ForSequenceClassification, which "
            "gives the score itself"
        )


def _check_prompt(found: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for a prompt that is put before each pair where none is named."""
    prompts = found.get("prompts")
    prompt = prompts.get(found.get("default_prompt_name")) if isinstance(prompts, Mapping) else None
    if prompt:
        raise CheckpointError(
            f"{path}: sentence-transformers puts the prompt {shown(repr(prompt))} before each instruction, and a "
            "bundle scores texts as they are; set default_prompt_name to null, and put the prompt there yourself"
        )
