"""Read what sentence-transformers, from 5.4 on, keeps of a CrossEncoder beside its config.json.

That may be the activation, a prompt for every instruction, how texts are read, and modules behind the model. What the
exporter does not do is refused, for no parity check could see that it is missing: PyTorch's reference has only
config.json, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import read_any_json, read_json
from cappy_export.checkpoints.hub import CROSS_ENCODER_FILES
from cappy_export.checkpoints.naming import shown
from cappy_export.checkpoints.score_modules import ScoreModules, is_head, read_modules

MODULES, INPUTS, SAVED = CROSS_ENCODER_FILES

READ_OTHERWISE = {
    "do_lower_case": "put a lower-casing normalizer into tokenizer.json",
    "max_seq_length": "put it into tokenizer_config.json, as model_max_length",
    "processing_kwargs": "put what counts into the tokenizer's files",
}
"""Keys of sentence_bert_config.json that change the tokens of a text, with what to do instead."""


@dataclass(frozen=True)
class SavedCrossEncoder:
    """Hold a CrossEncoder's own `config`, and the modules that compute its score, if it is not the model itself."""

    config: Mapping[str, Any] = field(default_factory=dict)
    modules: ScoreModules | None = None


def read_cross_encoder(folder: Path, *, needs_head: bool = True) -> SavedCrossEncoder:
    """Read what is kept of a CrossEncoder in a checkpoint's folder; empty unless it is one.

    >>> read_cross_encoder(Path("export/cappy_mini/checkpoint")).config
    {}

    sentence-transformers reads config_sentence_transformers.json only beside a modules.json. Raises CheckpointError for
    scores that come from more than the model, its head and the texts of a pair. Unless it `needs_head`, only a head is
    looked for, and what is not one is left out.
    """
    if not (folder / MODULES).is_file() or not (folder / SAVED).is_file():
        return SavedCrossEncoder()
    found = read_json(folder / SAVED)
    if found.get("model_type") != "CrossEncoder":
        return SavedCrossEncoder()
    if not needs_head:
        told = read_any_json(folder / MODULES)
        return SavedCrossEncoder({}, _read_modules(folder)) if is_head(told) else SavedCrossEncoder()
    modules = _read_modules(folder)
    _check_inputs(folder / INPUTS, output="last_hidden_state" if modules else "logits")
    _check_prompt(found, folder / SAVED)
    return SavedCrossEncoder(found, modules)


def _read_modules(folder: Path) -> ScoreModules | None:
    """Read the modules behind the model; None if the model in config.json is all there is."""
    path = folder / MODULES
    modules = read_any_json(path)
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise CheckpointError(f"{path} must hold a list of modules, found {shown(repr(modules))}")
    first = str(modules[0].get("type")).rpartition(".")[2]
    if first != "Transformer" or modules[0].get("path") != "":
        raise CheckpointError(
            f"{path}: the first module must be a Transformer beside it, found {shown(repr(modules[0]))}"
        )
    return read_modules(folder, modules[1:], path) if len(modules) > 1 else None


def _check_inputs(path: Path, *, output: str) -> None:
    """Raise CheckpointError for texts that are read otherwise than the tokenizer's files say, and other outputs."""
    found = read_json(path) if path.is_file() else {}
    for key, instead in READ_OTHERWISE.items():
        if found.get(key):
            raise CheckpointError(
                f"{path}: {key} is {shown(repr(found[key]))}, which only sentence-transformers reads; {instead}, and "
                "remove it here"
            )
    text = (found.get("modality_config") or {}).get("text") or {"method": "forward", "method_output_name": output}
    if text != {"method": "forward", "method_output_name": output}:
        raise CheckpointError(
            f"{path}: the text's output is {shown(repr(text))}; exported is {output} of the model's forward"
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
