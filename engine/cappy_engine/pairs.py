"""Check that pairs are pairs of texts. Knows nothing of files, tokens or models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cappy_engine.errors import InvalidPair

Pair = tuple[str, str]
"""(instruction, response), both taken as they are: nothing is stripped or normalised."""


def check_pairs(pairs: Iterable[Sequence[str]]) -> list[Pair]:
    """Return `pairs` as a list of tuples.

        >>> check_pairs([["Is the sky blue?", "Yes"]])
        [('Is the sky blue?', 'Yes')]

    Raises InvalidPair (with the index) for anything that is not two strings, and for a string that is not valid
    Unicode (a lone surrogate): no tokenizer could see it.
    """
    if isinstance(pairs, str):
        raise InvalidPair(0, f"expected (instruction, response) pairs, got one str: {pairs[:40]!r}")
    checked: list[Pair] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidPair(index, f"expected a tuple (instruction, response), got {described(pair)}")
        for part, text in zip(("instruction", "response"), pair, strict=True):
            problem = text_problem(text)
            if problem:
                raise InvalidPair(index, f"{part} {problem}")
        checked.append((pair[0], pair[1]))
    return checked


def text_problem(text: object) -> str | None:
    """Say why `text` cannot be tokenised, or None if it can.

    >>> text_problem(3)
    'must be a str, got int 3'
    """
    if not isinstance(text, str):
        return f"must be a str, got {described(text)}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a lone surrogate {text[error.start]!r} at character {error.start}; it is not valid Unicode"
    return None


def described(value: object) -> str:
    """Show a value for an error, with its type.

    >>> described(3)
    'int 3'
    """
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """Show a value for an error, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
