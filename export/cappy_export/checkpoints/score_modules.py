"""Read a score that modules of sentence-transformers compute behind a ModernBERT: ettin's rerankers are published so.

Pooling, Dense, LayerNorm and Dense compute what the head of ModernBertForSequenceClassification computes, so such a
checkpoint becomes one with that head. No parity check could see a module that is read wrongly, since PyTorch's
reference is built from the same head: what is not known exactly is refused, and a test compares sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import read_json
from cappy_export.checkpoints.naming import listed, shown
from cappy_export.checkpoints.weights import read_weights

KINDS = ("Pooling", "Dense", "LayerNorm", "Dense")
"""The modules behind the model, in their order."""
PACKAGE = "sentence_transformers."
CONFIG, WEIGHTS = "config.json", "model.safetensors"

VECTOR, ANYTHING = "sentence_embedding", None
SAID: tuple[Mapping[str, tuple[Any, ...] | None], ...] = (
    {"embedding_dimension": ANYTHING, "pooling_mode": ("cls", "mean"), "include_prompt": ANYTHING},
    {
        "in_features": ANYTHING,
        "out_features": ANYTHING,
        "bias": (False, True),
        "activation_function": ("torch.nn.modules.activation.GELU",),
        "module_input_name": (VECTOR,),
        "module_output_name": (VECTOR,),
    },
    {"dimension": ANYTHING},
    {
        "in_features": ANYTHING,
        "out_features": (1,),
        "bias": (False, True),
        "activation_function": ("torch.nn.modules.linear.Identity",),
        "module_input_name": (VECTOR,),
        "module_output_name": ("scores",),
    },
)
"""What the config of each module may say, by key. Sizes are compared with the weights'."""
NORM_EPS = 1e-5
"""What PyTorch's LayerNorm adds to a variance, where nothing else is said."""


@dataclass(frozen=True)
class ScoreModules:
    """Name the folders of the modules.

    `config` holds the keys that describe the same head in a model's config.json.
    """

    pooling: str
    dense: str
    norm: str
    scores: str
    config: Mapping[str, Any] = field(kw_only=True)

    @property
    def files(self) -> tuple[str, ...]:
        """List the files that the export reads, beside the model's own."""
        with_weights = (self.dense, self.norm, self.scores)
        return (f"{self.pooling}/{CONFIG}", *(f"{each}/{name}" for each in with_weights for name in (CONFIG, WEIGHTS)))


def is_head(modules: Any) -> bool:
    """Tell whether the content of a modules.json names a model and its head.

    >>> is_head([{"type": "sentence_transformers.base.modules.transformer.Transformer"}])
    False
    """
    kinds = [_kind(module) for module in modules] if isinstance(modules, list) else []
    return kinds == ["Transformer", *KINDS]


def read_modules(folder: Path, modules: Sequence[Mapping[str, Any]], path: Path) -> ScoreModules:
    """Judge the `modules` behind the model, and read their configs.

    >>> read_modules(folder, json.loads(path.read_text())[1:], path).config["classifier_pooling"]
    'cls'

    `modules` are entries of the modules.json at `path`. Raises CheckpointError for all that a ModernBERT's own head
    does not compute.
    """
    names = [_kind(module) for module in modules]
    config = read_json(folder / CONFIG)
    if tuple(names) != KINDS:
        raise _not_exported(path, listed(names))
    if config.get("model_type") != "modernbert":
        raise _not_exported(path, f"{listed(names)} behind a model of the type {shown(config.get('model_type'))}")
    places = [_folder_of(module, path) for module in modules]
    told = [_read(folder / place / CONFIG, said) for place, said in zip(places, SAID, strict=True)]
    for place in places[1:]:
        if not (folder / place / WEIGHTS).is_file():
            raise CheckpointError(f"{folder / place / WEIGHTS} is missing; a module that computes the score needs it")
    if config.get("norm_eps", NORM_EPS) != NORM_EPS:
        raise CheckpointError(
            f"{folder / CONFIG}: norm_eps is {shown(config['norm_eps'])}; exported is {NORM_EPS}, as the LayerNorm of "
            f"{path} has it"
        )
    head = {
        "classifier_pooling": told[0]["pooling_mode"],
        "classifier_activation": "gelu",
        "classifier_bias": told[1]["bias"],
        "norm_bias": config.get("norm_bias", False),
    }
    return ScoreModules(*places, config=head)


def with_head_weights(
    folder: Path, modules: ScoreModules, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Put the modules' weights beside the `weights` of the encoder.

    >>> sorted(with_head_weights(folder, modules, {}))[:2]
    ['classifier.bias', 'classifier.weight']

    The modules' weights get the names of a ModernBERT's head. Where a ModernBERT has no biases in its norms, the bias
    of the head's norm becomes part of the classifier's bias. Raises CheckpointError for files that cannot be read, and
    weights that are missing or not known.
    """
    dense = _weights(folder / modules.dense / WEIGHTS, "linear", has_bias=modules.config["classifier_bias"])
    norm = _weights(folder / modules.norm / WEIGHTS, "norm", has_bias=True)
    scores = _weights(folder / modules.scores / WEIGHTS, "linear", has_bias=None)
    if norm["bias"].shape != scores["weight"].shape[1:]:
        raise CheckpointError(
            f"{folder / modules.norm / WEIGHTS} has {tuple(norm['bias'].shape)} as norm.bias, and the scores' Dense "
            f"{tuple(scores['weight'].shape)} as linear.weight; they do not belong together"
        )
    bias = scores.get("bias", torch.zeros(1)).double()
    if not modules.config["norm_bias"]:
        bias = bias + scores["weight"].double() @ norm.pop("bias").double()
    head = {
        "head.dense.weight": dense["weight"],
        **{f"head.norm.{name}": value for name, value in norm.items()},
        "classifier.weight": scores["weight"],
        "classifier.bias": bias.float(),
    }
    if "bias" in dense:
        head["head.dense.bias"] = dense["bias"]
    is_encoder = not any(name.startswith("model.") for name in weights)
    return {**{f"model.{name}" if is_encoder else name: value for name, value in weights.items()}, **head}


def _kind(module: Any) -> str:
    """Name the class of a module: shortly, if it is sentence-transformers' own."""
    kind = str(module.get("type")) if isinstance(module, dict) else repr(module)
    return kind.rpartition(".")[2] if kind.startswith(PACKAGE) else kind


def _weights(path: Path, prefix: str, *, has_bias: bool | None) -> dict[str, torch.Tensor]:
    """Read a module's weight and bias; `has_bias` is None where it may have one."""
    found = read_weights([path], "safetensors")
    wanted = [{f"{prefix}.weight"} | ({f"{prefix}.bias"} if bias else set()) for bias in (True, False)]
    allowed = wanted if has_bias is None else [wanted[0 if has_bias else 1]]
    if set(found) not in allowed:
        raise CheckpointError(f"{path} must have {listed(sorted(allowed[0]))}, found {listed(sorted(found))}")
    return {name.removeprefix(f"{prefix}."): value for name, value in found.items()}


def _folder_of(module: Mapping[str, Any], path: Path) -> str:
    """Take the folder of a module, which is beside its modules.json."""
    place = module.get("path")
    if not isinstance(place, str) or Path(place).name != place or place in ("", "..") or module.get("kwargs"):
        raise CheckpointError(
            f"{path}: a module's path must be a folder beside it, and its kwargs must be empty, found "
            f"{shown(repr(dict(module)))}"
        )
    return place


def _read(path: Path, said: Mapping[str, tuple[Any, ...] | None]) -> dict[str, Any]:
    """Read a module's config; raises CheckpointError unless it has the keys of `said`, each with one of its values."""
    config = read_json(path)
    if set(config) != set(said):
        raise CheckpointError(f"{path} must have the keys {listed(sorted(said))}, found {listed(sorted(config))}")
    for key, values in said.items():
        if values is not ANYTHING and not any(
            config[key] == each and type(config[key]) is type(each) for each in values
        ):
            raise CheckpointError(
                f"{path}: {key} is {shown(repr(config[key]))}; exported is {' or '.join(map(repr, values))}, as in a "
                "ModernBERT's own head"
            )
    return config


def _not_exported(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the score comes from {what} behind the model, modules of sentence-transformers. Exported are "
        f"{', '.join(KINDS)} behind a ModernBERT, and models ...ForSequenceClassification, which give the score "
        "themselves"
    )
