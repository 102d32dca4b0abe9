"""Translate ModernBERT configs into the keys of transformers 4.

The configs come from transformers 5 or from ModernBERT's authors. transformers 5 writes `layer_types` and
`rope_parameters`, which transformers 4 would drop without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cappy_engine.errors import CheckpointError
from cappy_export.checkpoints.known_keys import parameters
from cappy_export.checkpoints.naming import shown

KINDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
"""Kinds of layers, with the key that has the base of their rotary positions in transformers 4."""


def translate(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a ModernBERT's config with the keys that transformers 4 reads; others stay as they are.

    >>> translate({"rope_parameters": {"full_attention": {"rope_theta": 8e4}}}, Path("config.json"))
    {'global_rope_theta': 80000.0}

    Raises CheckpointError for what these keys cannot say.
    """
    found = dict(config)
    rope, kinds = found.pop("rope_parameters", None), found.pop("layer_types", None)
    if rope is not None:
        if not isinstance(rope, dict) or not set(rope) <= set(KINDS):
            raise _untranslatable(path, "rope_parameters", rope)
        for kind, key in KINDS.items():
            theta = _theta(path, rope, kind)
            if theta is not None:
                _agree(path, found, key, theta)
    if kinds is not None:
        _agree(path, found, "global_attn_every_n_layers", _every(path, kinds, found))
    for key, read_instead in (("layer_norm_eps", "norm_eps"), ("rope_theta", "global_rope_theta")):
        if key in found and found[key] == found.get(read_instead, parameters("modernbert")[read_instead]):
            del found[key]
    if found.get("position_embedding_type") in ("absolute", "sans_pos"):  # in authors' configs, and no version reads it
        del found["position_embedding_type"]
    return found


def _theta(path: Path, rope: Mapping[str, Any], kind: str) -> float | None:
    """Take the base of one kind of layers; None where it is left to the default."""
    told = rope.get(kind)
    if told is None:
        return None
    is_plain = isinstance(told, dict) and set(told) <= {"rope_type", "rope_theta"}
    if not is_plain or told.get("rope_type", "default") != "default":
        raise _untranslatable(path, "rope_parameters", rope)
    theta = told.get("rope_theta")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float))):
        raise _untranslatable(path, "rope_parameters", rope)
    return theta


def _every(path: Path, kinds: Any, config: Mapping[str, Any]) -> int:
    """Find n such that only every n-th layer, from the first, has full attention."""
    if isinstance(kinds, list) and kinds and len(kinds) == config.get("num_hidden_layers", len(kinds)):
        told = config.get("global_attn_every_n_layers")
        for every in [told] if isinstance(told, int) and told > 0 else range(1, len(kinds) + 1):
            if kinds == ["sliding_attention" if layer % every else "full_attention" for layer in range(len(kinds))]:
                return every
    raise _untranslatable(path, "layer_types", kinds)


def _agree(path: Path, config: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` under `key`, where there may be the same one already."""
    if config.setdefault(key, value) != value:
        raise CheckpointError(f"{path} contradicts itself: {key!r} is {shown(config[key])}, and {value} by newer keys")


def _untranslatable(path: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: {key!r}, which transformers 5 writes, has what transformers 4 cannot compute for ModernBERT: "
        f"{shown(repr(value))}; needed are default rotary positions, and full attention in every n-th layer"
    )
