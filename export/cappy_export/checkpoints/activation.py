"""Read from a checkpoint what its authors' tools apply to the model's output. Bundles give it raw, and say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.hub import CROSS_ENCODER_FILES
from cappy_export.checkpoints.naming import shown

FUNCTIONS = {"Identity": "identity", "Sigmoid": "sigmoid"}
"""Functions of torch.nn that keep the order of scores, with the engine's names for them."""

OF_PROBLEMS = {
    "regression": "identity",
    "single_label_classification": "sigmoid",
    "multi_label_classification": "sigmoid",
}
"""What the pipeline of transformers applies to one output, by `problem_type`."""


def find_activation(
    config: Mapping[str, Any], path: Path, saved: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, str | None]:
    """Find the activation that a config.json names, and the key that names it; None where nothing does.

        >>> find_activation({"problem_type": "regression"}, Path("config.json"))
        {'activation': 'identity', 'told_by': 'problem_type'}

    What a CrossEncoder `saved` beside it counts first (`cross_encoder.py`), then sentence-transformers' keys in it, and
    transformers' own last. Raises CheckpointError for a function that is not known.
    """
    name = saved.get("activation_fn")
    if name is not None:
        beside = path.with_name(CROSS_ENCODER_FILES[-1])
        return {"activation": _known(name, "activation_fn", beside), "told_by": f"{beside.stem}.activation_fn"}
    told = config.get("sentence_transformers")
    function = told.get("activation_fn") if isinstance(told, Mapping) else None
    for key, name in (
        ("sentence_transformers.activation_fn", function),
        ("sbert_ce_default_activation_function", config.get("sbert_ce_default_activation_function")),
    ):
        if name is not None:
            return {"activation": _known(name, key, path), "told_by": key}
    problem = config.get("problem_type")
    return {"activation": OF_PROBLEMS.get(str(problem)), "told_by": None if problem is None else "problem_type"}


def _known(name: object, key: str, path: Path) -> str:
    """Take the function's name; it is never imported."""
    package, _, function = str(name).rpartition(".")
    if (package != "torch.nn" and not package.startswith("torch.nn.")) or function not in FUNCTIONS:
        raise CheckpointError(
            f"{path}: {key} is {shown(repr(name))}; known are torch.nn.Identity and torch.nn.Sigmoid. Scores are raw: "
            "remove the key if you want the model's output, or apply the function yourself"
        )
    return FUNCTIONS[function]
