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
from cappy_export.checkpoints.hub import CROSS_ENCODER_FILES, OTHER_INPUTS
from cappy_export.checkpoints.naming import listed, shown
from cappy_export.checkpoints.score_modules import ScoreModules, is_head, read_modules

MODULES, INPUTS, SAVED = CROSS_ENCODER_FILES

KNOWN_INPUTS = ("transformer_task", "modality_config", "module_output_name", "unpad_inputs")
"""Keys of sentence_bert_config.json that are checked, or change no score. Any other one may change the scores."""
INSTEAD = {
    "do_lower_case": "put a lower-casing normalizer into tokenizer.json",
    "max_seq_length": "put it into tokenizer_config.json, as model_max_length",
    **dict.fromkeys(("processing_kwargs", "processor_kwargs", "tokenizer_args"), "put it into the tokenizer's files"),
    **dict.fromkeys(("config_kwargs", "config_args", "model_kwargs", "model_args"), "put what counts into config.json"),
}
"""What to do in the place of such a key."""


@dataclass(frozen=True)
class SavedCrossEncoder:
    """Hold a CrossEncoder's own `config`, and its `modules`.

    The modules compute its score. They are None if the model itself computes it.
    """

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
    if not is_cross_encoder(folder):
        return SavedCrossEncoder()
    found = read_json(folder / SAVED)
    if not needs_head:
        told = read_any_json(folder / MODULES)
        return SavedCrossEncoder({}, _read_modules(folder)) if is_head(told) else SavedCrossEncoder()
    modules = _read_modules(folder)
    for name in OTHER_INPUTS if not (folder / INPUTS).is_file() else ():
        if (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: only {INPUTS} is read here; give the file this name")
    _check_inputs(folder / INPUTS, output="last_hidden_state" if modules else "logits")
    _check_prompt(found, folder / SAVED)
    return SavedCrossEncoder(found, modules)


def is_cross_encoder(folder: Path) -> bool:
    """Tell whether sentence-transformers, 5.4 or later, saved the checkpoint as a CrossEncoder.

    >>> is_cross_encoder(Path("export/cappy_mini/checkpoint"))
    False
    """
    is_saved = (folder / MODULES).is_file() and (folder / SAVED).is_file()
    return is_saved and read_json(folder / SAVED).get("model_type") == "CrossEncoder"


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
    """Raise CheckpointError unless texts are read as the tokenizer's files say.

    Also raises it for any other output than `output`.
    """
    found = read_json(path) if path.is_file() else {}
    for key in sorted(key for key, value in found.items() if value and key not in KNOWN_INPUTS):
        raise CheckpointError(
            f"{path}: {shown(key)} is {shown(repr(found[key]))}, which only sentence-transformers reads; "
            f"{INSTEAD.get(key, 'put what counts into other files')}, and remove it here"
        )
    modalities = found.get("modality_config") or {}
    if not isinstance(modalities, dict):
        raise CheckpointError(f"{path}: modality_config must be an object, found {shown(repr(modalities))}")
    if "message" in modalities:
        raise CheckpointError(
            f"{path}: modality_config has message: sentence-transformers writes a pair as messages by the tokenizer's "
            "chat template, and a bundle scores texts as they are; if the model was trained on bare texts, remove this "
            "entry, and the template (chat_template.jinja, or chat_template in tokenizer_config.json)"
        )
    if others := sorted(set(modalities) - {"text"}):
        raise CheckpointError(f"{path}: modality_config has {listed(others)}; a bundle scores texts alone")
    text = modalities.get("text") or {"method": "forward", "method_output_name": output}
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
