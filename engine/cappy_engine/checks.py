"""Check arguments: words, flags and numbers. A wrong one is a ValueError with its name, value and choices."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np


def check_word(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the words `choices`.

    >>> check_word("padding", "removed", ("removed", "avoided", "allowed"))
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name} {shown(value)}; choose from {', '.join(choices)}")


def check_count(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    """Return a whole number from `least` to `most` (any, if None) as an int; numpy's integers are taken too.

        >>> check_count("threads", 4)
        4

    Raises ValueError for anything else: a bool, a float and a text are not counts.
    """
    try:
        count = operator.index(value)  # type: ignore[arg-type]  # that is asked here
    except TypeError:
        count = None
    if count is None or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {described(value)}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return count


def check_number(name: str, value: object, *, least: float | None = None) -> float:
    """Return a number as a float: with `least` a finite one of at least that, without it perhaps infinite.

        >>> check_number("seconds", 20, least=0.5)
        20.0

    Raises ValueError for anything else: a bool, a text and nan are not numbers.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {described(value)}")  # noqa: TRY004 - as for all options
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float holds
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number) or (least is not None and math.isinf(number)):
        raise ValueError(f"{name} must be finite, got {number}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least:g}, got {number:g}")
    return number


def check_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False: any text would count as true.

    >>> check_flag("exact_winner", True)
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {described(value)}")  # noqa: TRY004 - as for all options


def check_callable(name: str, value: object) -> None:
    """Raise ValueError unless `value` can be called, or is None.

    >>> check_callable("progress", print)
    """
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be a function, got {described(value)}")


def check_names(name: str, values: Iterable[str]) -> list[str]:
    """Return a collection of words as a list.

    >>> check_names("precisions", ["int8"])
    ['int8']

    Raises ValueError for one text, whose letters would be taken.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of words, got {described(values)}")  # noqa: TRY004 - as for all options
    return list(values)


def described(value: object) -> str:
    """Show a value for an error, with its type.

    >>> described(3)
    'int 3'
    """
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """Show a value for an error, in one line of at most 60 characters."""
    if isinstance(value, (str, bytes, bytearray, list, tuple)) and len(value) > 60:
        value = value[:60]  # no text of a gigabyte is written out to be cut
    text = " ".join(repr(value).splitlines())
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """Put a dot for every character that is not printable: a manifest must not steer a terminal.

    >>> printable("one\\ttwo")
    'one·two'
    """
    return "".join(character if character.isprintable() else "·" for character in text)
