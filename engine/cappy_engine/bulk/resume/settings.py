"""Tell which settings of a run have changed. Pure: dictionaries in, words out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Name the settings, of any depth, that differ; empty if none does.

    >>> changes({"recipe": {"seed": 0}}, {"recipe": {"seed": 1}})
    'recipe.seed was 0, is 1'
    """
    old, new = _flat(before), _flat(json.loads(json.dumps(after)))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return "; ".join(f"{name} was {_word(old.get(name))}, is {_word(new.get(name))}" for name in names)


def _word(value: Any) -> str:
    return "not set" if value is None else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
