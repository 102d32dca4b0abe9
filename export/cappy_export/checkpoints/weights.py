"""Read weights of any format, and check that they fit the model."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.flax import read_flax

LEGACY_BUFFERS = (".position_ids", ".token_type_ids")
"""Buffers that transformers stored before 4.31; they hold no weights."""


def read_weights(files: Iterable[Path], format_: str) -> dict[str, torch.Tensor]:
    """Read the weights in `files` by PyTorch's names, in the type of the file.

    >>> read_weights([Path("export/cappy_mini/checkpoint/model.safetensors")], "safetensors")

    `format_` is "safetensors", "bin" or "msgpack". Raises CheckpointError if a file cannot be read safely, or a name
    occurs twice.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        for key, value in _read_file(path, format_).items():
            name = _modern_name(key)
            if name in weights:
                raise CheckpointError(f"{path} has the weight {name} for the second time")
            if not key.endswith(LEGACY_BUFFERS):
                weights[name] = value
    return weights


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError that names every weight with NaN or infinity in it.

    >>> check_finite({"classifier.bias": torch.zeros(1)})
    """
    broken = [key for key, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(f"NaN or infinite weights in {', '.join(broken)}")


def check_keys(needed: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Raise one CheckpointError for all keys that do not match in name and shape.

    >>> check_keys(model.state_dict(), read_weights([Path("model.safetensors")], "safetensors"))
    """
    needed = {key: value for key, value in needed.items() if not key.endswith(LEGACY_BUFFERS)}
    missing, unexpected = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    misshapen = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(needed[key].shape)}"
        for key in sorted(set(needed) & set(found))
        if found[key].shape != needed[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        lines = [f"  {len(keys)} {kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
        raise CheckpointError("\n".join(["the weights do not fit config.json:", *lines]))


def _read_file(path: Path, format_: str) -> dict[str, torch.Tensor]:
    if format_ == "msgpack":
        return {key: torch.from_numpy(array) for key, array in read_flax(path).items()}
    try:
        if format_ == "safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors, and loading it could run code: {error}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} must hold a map of names to tensors (a state_dict)")
    return weights


def _modern_name(key: str) -> str:
    """Replace TensorFlow's names for LayerNorm, which early BERT checkpoints kept."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key
