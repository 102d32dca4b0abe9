"""Read values of JSON documents strictly: what is not exactly of its kind is an error, never converted."""

from __future__ import annotations


def whole(value: object) -> int:
    """Read a whole number; true and false are none. Raises TypeError.

    >>> whole(512)
    512
    """
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def number(value: object) -> float:
    """Read a finite number. Raises TypeError and ValueError.

    >>> number(-0.25)
    -0.25
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is not a number")
    if not -_LARGEST <= value <= _LARGEST:  # NaN is in no range
        raise ValueError(f"{value!r} is not a number of at most {_LARGEST:g}")
    return float(value)


def size(value: object) -> float:
    """Read a finite number from 0 on. Raises TypeError and ValueError.

    >>> size(0.25)
    0.25
    """
    if (found := number(value)) < 0:
        raise ValueError(f"{value!r} is below 0")
    return found


def text(value: object) -> str:
    """Read a string. Raises TypeError.

    >>> text("int8")
    'int8'
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


_LARGEST = 1e30
"""Larger whole numbers than a float holds are valid JSON; nothing that we measure is near."""
