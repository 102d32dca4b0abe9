"""Check that pairs are pairs of texts. Knows nothing of files, tokens or models.

Pairs and candidates may come from anything that is iterated over: lists, generators, sets, arrays, columns of tables.
It is gone through once, and never indexed: a pandas Series looks up `series[0]` by its label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar, cast, get_args

from cappy_engine.checks import described, shown
from cappy_engine.errors import InvalidPair

Pair = tuple[str, str]
"""(instruction, response), both taken as they are: nothing is stripped or normalised."""
TooLong = Literal["truncate", "refuse"]
"""What happens to a pair with more tokens than the model takes."""
TOO_LONG: tuple[TooLong, ...] = get_args(TooLong)
MAX_TEXT_CHARS = 1_000_000
"""Characters of a text: far more than any model reads, and tokenised in some 200 MB. A longer one is a mistake."""

Item = TypeVar("Item")


def check_pairs(pairs: Iterable[Sequence[str]], *, max_text_chars: int = MAX_TEXT_CHARS) -> list[Pair]:
    """Return `pairs` as a list of tuples.

        >>> check_pairs([["Is the sky blue?", "Yes"]])
        [('Is the sky blue?', 'Yes')]

    A pair is a tuple, a list, or another row of two: of an array, a Series. Raises InvalidPair (with the index) for
    anything that is not two strings of at most `max_text_chars` characters, and for a string that is not valid Unicode
    (a lone surrogate): no tokenizer could see it.
    """
    checked: list[Pair] = []
    for index, pair in enumerate(_listed(pairs, "expected (instruction, response) pairs", _hint_for_pairs)):
        instruction, response = map(plain, _two(index, pair))
        for part, text in (("instruction", instruction), ("response", response)):
            if isinstance(text, str) and len(text) > max_text_chars:
                raise InvalidPair(
                    index,
                    f"{part} has {len(text)} characters, and max_text_chars is {max_text_chars}; shorten it, or raise "
                    "that limit",
                )
            problem = text_problem(text)
            if problem:
                raise InvalidPair(index, f"{part} {problem}")
        checked.append((cast(str, instruction), cast(str, response)))
    return checked


def candidate_pairs(instruction: str, candidates: Iterable[str]) -> list[Pair]:
    """Pair an instruction with each of its candidates; `check_pairs` has to look at the texts.

        >>> candidate_pairs("Is the sky blue?", ["Yes", "No"])
        [('Is the sky blue?', 'Yes'), ('Is the sky blue?', 'No')]

    Raises InvalidPair if the instruction is not a string, or the candidates are not a collection of texts.
    """
    listed = _listed(candidates, "candidates must be a list of strings", _hint_for_candidates)
    text = plain(instruction)
    if not isinstance(text, str):
        raise InvalidPair(0, f"instruction {text_problem(text)}")
    return [(text, cast(str, plain(candidate))) for candidate in listed]


def plain(value: object) -> object:
    """Return a str of exactly that type for numpy's and others' strings, and the value of an Arrow scalar.

    >>> plain(np.str_("Yes"))
    'Yes'
    """
    if isinstance(value, str):
        return value if type(value) is str else str.__str__(value)
    as_py = getattr(type(value), "as_py", None)
    return value if as_py is None else as_py(value)


def text_problem(text: object) -> str | None:
    """Say why `text` cannot be tokenised, or None if it can.

    >>> text_problem(3)
    'must be a str, got int 3'
    """
    if not isinstance(text, str):
        return f"must be a str, got {described(text)}"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a lone surrogate {text[error.start]!r} at character {error.start}; it is not valid Unicode"
    return None


def _listed(values: Iterable[Item], wanted: str, hint: Callable[[Sequence[object]], str]) -> list[Item]:
    """Go through `values` once. Refuse a text and a table: they are iterated over, but not by rows."""
    if isinstance(values, str):
        raise InvalidPair(0, f"{wanted}, got one str: {values[:40]!r}")
    names = _column_names(values)
    if names is not None:
        raise InvalidPair(0, f"{wanted}, got {type(values).__name__} with the columns {shown(names)}; {hint(names)}")
    try:
        iterator = None if isinstance(values, (bytes, bytearray, memoryview)) else iter(values)
    except TypeError:
        iterator = None
    if iterator is None:
        raise InvalidPair(0, f"{wanted}, got {described(values)}")
    return list(iterator)


def _column_names(values: object) -> list[object] | None:
    """Name the columns of a table (pandas, polars, Arrow, datasets, a dict), which iterates over them; else None."""
    if isinstance(values, Mapping):
        return list(values)
    for attribute in ("column_names", "columns"):
        names = getattr(values, attribute, None)
        if isinstance(names, Iterable) and not isinstance(names, str):
            return list(names)
    return None


def _hint_for_pairs(names: Sequence[object]) -> str:
    first, second = names if len(names) == 2 else ("instruction", "response")
    return f"pass its rows, as in list(zip(table[{first!r}], table[{second!r}]))"


def _hint_for_candidates(names: Sequence[object]) -> str:
    return f"pass one of its columns, as in table[{names[0] if len(names) == 1 else 'response'!r}]"


def _two(index: int, pair: object) -> Sequence[object]:
    """Return the two parts of a pair."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        return pair
    row = plain(pair)
    length = _length(row)
    if length == 2:
        return list(cast(Iterable[object], row))
    problem = f"expected a tuple (instruction, response), got {described(row)}"
    if isinstance(row, str):
        raise InvalidPair(index, f"{problem}; one pair alone is [(instruction, response)]")
    raise InvalidPair(index, problem if length is None else f"{problem} of length {length}")


def _length(row: object) -> int | None:
    """Count the parts of a row; None for what is not one: texts, tables, and what has no order."""
    is_ordered = hasattr(row, "__getitem__") and not isinstance(row, (str, bytes, bytearray, memoryview))
    if not is_ordered or _column_names(row) is not None:
        return None
    try:
        return len(row)  # type: ignore[arg-type]
    except TypeError:  # numpy's array of no dimension
        return None
