"""Wrong values for every field of a dataclass that is `Asked`, by what its annotation says."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cappy_engine.options import Asked

WRONG: dict[Any, tuple[Any, ...]] = {
    bool: ("no", 1, None),
    int: ("8", True, 2.5),
    float: ("0.5", True, float("nan")),
    str: (3, True, b"text"),
    Path: (3, True, ""),
}
"""Values of a wrong type for each kind of field, and nan."""


def wrong_values(cls: type[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Give a field's name, a value that it refuses, and what of it an error shows.

    >>> list(wrong_values(RowOptions))[0]
    ('on_error', 'nonsense', 'nonsense')
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, *notes = typing.get_args(hints[field.name]) or (hints[field.name],)
        for how in notes:
            if isinstance(how, Asked):
                for value, shown in _wrong(kind, how):
                    yield field.name, value, shown


def _wrong(kind: Any, how: Asked) -> Iterator[tuple[Any, Any]]:
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if types.NoneType not in kinds:
        yield None, None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        yield from (("text", "text"), (3, 3))
        for value, shown in _wrong(typing.get_args(kind)[0], how):
            yield [value], shown
        return
    wrong = ("nonsense", True, 3) if how.choices else WRONG.get(kind, ([1], "text"))
    yield from zip(wrong, wrong, strict=True)
    if how.least is not None or kind is int:
        below = (how.least or 0) - 1
        yield (int(below), int(below)) if kind is int else (below, f"{below:g}")
    if how.most is not None:
        yield how.most + 1, how.most + 1
