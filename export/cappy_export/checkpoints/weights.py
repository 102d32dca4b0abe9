"""Read weights of any format, and check that they fit the model. Memory is taken for the model only then."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.config import read_json
from cappy_export.checkpoints.flax import read_flax
from cappy_export.checkpoints.hub import MERGE
from cappy_export.checkpoints.naming import listed, shown
from cappy_export.checkpoints.refusals import refusing

LEGACY_BUFFERS = (".position_ids", ".token_type_ids", "rotary_emb.inv_freq")
"""Buffers that older transformers stored, and newer ones compute; they hold no weights."""

NUMBERED = {
    "num_hidden_layers": re.compile(r"(?:^|\.)layers?\.(\d{1,9})\."),
    "num_hidden_groups": re.compile(r"\.albert_layer_groups\.(\d{1,9})\."),
    "inner_group_num": re.compile(r"\.albert_layers\.(\d{1,9})\."),
}
"""Keys of a config that count parts of the model, and the numbers of these parts in the names of weights."""
MAX_COUNT = 1000

WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

ADAPTED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
"""What PEFT puts into the names of weights while an adapter is on a model."""

PREFIXES = {"module.": "DataParallel's", "_orig_mod.": "torch.compile's"}
"""Prefixes of all names that come from a wrapper, with its name."""


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
                raise CheckpointError(f"{path} has the weight {shown(name)} for the second time")
            if not key.endswith(LEGACY_BUFFERS):
                weights[name] = value
    return weights


def explain_by_index(index: Path, files: Iterable[Path], format_: str) -> str:
    """Say which weights the `index` of `files` names and none of them has, if any: that explains others' errors.

    >>> explain_by_index(folder / "model.safetensors.index.json", [folder / "a.safetensors"], "safetensors")
    '; /m/model.safetensors.index.json names 1 weights that its files do not have: classifier.bias; copy or ...'
    """
    try:
        lacking = set(read_json(index)["weight_map"]).difference(*(_read_file(path, format_) for path in files))
    except CheckpointError:  # a file that cannot be read: that is the error to be told
        return ""
    if not lacking:
        return ""
    return (
        f"; {index} names {len(lacking)} weights that its files do not have: {listed(sorted(lacking))}; copy or "
        "download the index and its files again, all from one place"
    )


def check_plain(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError that names weights which are not plain tensors of floating-point numbers.

    >>> check_plain({"classifier.bias": torch.zeros(1)})
    """
    odd = [f"{shown(key)} ({problem})" for key, value in weights.items() if (problem := _oddity(value))]
    if odd:
        known = ", ".join(str(each).removeprefix("torch.") for each in WEIGHT_TYPES)
        raise CheckpointError(
            f"{len(odd)} weights are not plain tensors of {known}: {listed(odd)}; convert them and save them again"
        )


def check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError that names weights with NaN or infinity, even if only in float32.

    >>> check_finite({"classifier.bias": torch.zeros(1)})
    """
    broken = [key for key, value in weights.items() if not bool(torch.isfinite(value.float()).all())]
    if broken:
        raise CheckpointError(f"NaN or infinite weights in {listed(broken)}")


def check_counts(config: Any, names: Iterable[str]) -> None:
    """Raise CheckpointError if transformers' `config` asks for other numbers of layers than the weights have.

    >>> check_counts(model.config, ["bert.encoder.layer.0.output.dense.bias"])

    Layers that the names do not number are at most MAX_COUNT. So no model is built that cannot fit.
    """
    names = list(names)
    for key, wanted in {**vars(config), "num_hidden_layers": getattr(config, "num_hidden_layers", None)}.items():
        if isinstance(wanted, bool) or not isinstance(wanted, int):
            continue
        pattern = NUMBERED.get(key)
        numbers = {found[1] for name in names if (found := pattern.search(name))} if pattern else set()
        if numbers and wanted != len(numbers):
            raise CheckpointError(
                f"config.json has {wanted} as {key}, and the weights have {len(numbers)}; take the config.json that "
                "was saved with these weights"
            )
        if key.startswith(("num_", "n_")) and wanted > MAX_COUNT:
            raise CheckpointError(f"config.json has {wanted} as {key}; at most {MAX_COUNT} can be")


def check_keys(needed: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], unused: Iterable[str]) -> None:
    """Raise one CheckpointError for all weights whose names or shapes do not match.

    >>> check_keys(model.state_dict(), read_weights([Path("model.safetensors")], "safetensors"), [])

    Weights with a name in `unused` are allowed.
    """
    adapted = sorted(key for key in found if ADAPTED.search(key))
    if adapted:
        raise CheckpointError(f"an adapter of PEFT, such as LoRA, is beside the weights: {listed(adapted)}; {MERGE}")
    needed = {key: value for key, value in needed.items() if not key.endswith(LEGACY_BUFFERS)}
    missing, unexpected = sorted(set(needed) - set(found)), sorted(set(found) - set(needed) - set(unused))
    prefix = common_prefix(needed, found)
    if missing and prefix:
        origin = PREFIXES.get(prefix, "a wrapper's")
        raise CheckpointError(
            f"all {len(found)} names of the weights begin with {shown(repr(prefix))} ({origin}); save the weights of "
            f"the model inside, or under names without it: name.removeprefix({shown(repr(prefix))})"
        )
    misshapen = [
        f"{shown(key)} {tuple(found[key].shape)} instead of {tuple(needed[key].shape)}"
        for key in sorted(set(needed) & set(found))
        if found[key].shape != needed[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        lines = [f"  {len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys]
        raise CheckpointError("\n".join(["the weights do not fit config.json:", *lines]))


def common_prefix(needed: Iterable[str], found: Iterable[str]) -> str | None:
    """Find the prefix of all `found` names before the model's own names, if any.

    >>> common_prefix(["classifier.bias"], ["module.classifier.bias"])
    'module.'
    """
    names, wanted = list(found), set(needed)
    for name in names[:1]:
        for at in [place + 1 for place, letter in enumerate(name) if letter == "."]:
            prefix = name[:at]
            if all(other.startswith(prefix) for other in names) and {other[at:] for other in names} & wanted:
                return prefix
    return None


def _oddity(value: torch.Tensor) -> str | None:
    """Say what is odd about a tensor; None for a plain one."""
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        return "nested" if value.is_nested else "quantised" if value.is_quantized else str(value.layout)
    if value.device.type != "cpu":
        return f"on the device {value.device.type}"
    if value.dtype not in WEIGHT_TYPES:
        return str(value.dtype).removeprefix("torch.")
    dense = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < dense:
            return "its elements share memory"
        dense = max(dense, stride * size)
    return None


def _read_file(path: Path, format_: str) -> dict[str, torch.Tensor]:
    if format_ == "msgpack":
        return {key: torch.from_numpy(array) for key, array in read_flax(path).items()}
    with refusing(f"{path} cannot be read"):
        weights: Any = load_file(path) if format_ == "safetensors" else _load_pickle(path)
    is_map = isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values())
    if not is_map or not all(isinstance(key, str) for key in weights):
        raise CheckpointError(f"{path} must hold a map of names to tensors (a state_dict)")
    return dict(weights)


def _load_pickle(path: Path) -> Any:
    """Load tensors, and nothing else, from a .bin; mapped, so that memory is taken for what is used."""
    is_mapped = zipfile.is_zipfile(path)
    if is_mapped:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(f"{path} has compressed parts, which torch.save does not write: {listed(packed)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors, and loading it could run code: {shown(error, 400)}"
        ) from error


def _modern_name(key: str) -> str:
    """Replace TensorFlow's names for LayerNorm, which early BERT checkpoints kept."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key
