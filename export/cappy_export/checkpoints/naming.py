"""Write names from foreign files into messages: few of them, short, and without control codes."""

from __future__ import annotations

from collections.abc import Iterable

AT_MOST = 8
LONGEST = 100


def listed(names: Iterable[object], at_most: int = AT_MOST) -> str:
    """List the first names, and count the others.

    >>> listed(["a", "b", "c"], at_most=2)
    'a, b and 1 more'
    """
    every = list(names)
    more = f" and {len(every) - at_most} more" if len(every) > at_most else ""
    return ", ".join(map(shown, every[:at_most])) + more


def shown(name: object, longest: int = LONGEST) -> str:
    r"""Write a name such that it can be printed. A name longer than `longest` is cut in the middle.

    >>> shown("weight\x1b[2J")
    "'weight\\x1b[2J'"
    """
    text = str(name) if str(name).isprintable() else repr(name)
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 2 :]}"
