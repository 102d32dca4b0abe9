"""Check that pairs are pairs of texts. Knows nothing of files, tokens or models.

Pairs and candidates may come from anything that is iterated over: lists, generators, sets, arrays, columns of tables.
It is gone through once, and never indexed: a pandas Series looks up `series[0]` by its label. Pairs may be a table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from cappy_engine.checks import described, shown
from cappy_engine.columns import INSTRUCTION, RESPONSE, WANTED, Table, column_names, pairs_of_table, row_names
from cappy_engine.errors import InvalidPair

Pair = tuple[str, str]
"""(instruction, response), both taken as they are: nothing is stripped or normalised."""
Pairs = Iterable[Sequence[str] | Mapping[str, object]] | Table
"""Pairs in any collection, or a table with the columns `instruction` and `response`."""
TooLong = Literal["truncate", "refuse"]
"""What happens to a pair with more tokens than the model takes."""
TOO_LONG: tuple[TooLong, ...] = get_args(TooLong)
MAX_TEXT_CHARS = 1_000_000
"""Characters of a text: far more than any model reads, and tokenised in some 200 MB. A longer one is a mistake."""


@dataclass(frozen=True)
class PairTexts:
    """The distinct `texts` of n pairs, and the `places` of each pair's texts: (n, 2) int64."""

    texts: list[str]
    places: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> PairTexts:
        """Keep the pairs from `start` to before `stop`, and their texts only.

        >>> read_pairs([("Is the sky blue?", "Yes"), ("Is the sea red?", "No")]).part(1, 2).texts
        ['Is the sea red?', 'No']
        """
        kept, places = np.unique(self.places[start:stop], return_inverse=True)
        return PairTexts([self.texts[place] for place in kept.tolist()], places.reshape(-1, 2))


def check_pairs(pairs: Pairs, *, max_text_chars: int = MAX_TEXT_CHARS) -> list[Pair]:
    """Return `pairs` as a list of tuples. Raises what `read_pairs` raises.

    >>> check_pairs([["Is the sky blue?", "Yes"]])
    [('Is the sky blue?', 'Yes')]
    """
    found = read_pairs(pairs, max_text_chars=max_text_chars)
    return [(found.texts[first], found.texts[second]) for first, second in found.places.tolist()]


def read_pairs(pairs: Pairs, *, max_text_chars: int = MAX_TEXT_CHARS) -> PairTexts:
    """Read the texts of `pairs`, each distinct one once.

        >>> read_pairs([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")]).texts
        ['Is the sky blue?', 'Yes', 'No']

    A pair is a tuple, a list, or another row of two: of an array, a Series; or a dict, or a row with names, that has
    `instruction` and `response`. Raises InvalidPair (with the index) for anything that is not two strings of at most
    `max_text_chars` characters, and for a string that is not valid Unicode (a lone surrogate): no tokenizer could see
    it.
    """
    places, found = dict[str, int](), array("q")
    for index, pair in enumerate(_rows(pairs)):
        for part, value in zip(("instruction", "response"), _two(index, pair), strict=True):
            place = places.get(value) if type(value) is str else None
            if place is None:
                text = plain(value)
                if isinstance(text, str) and len(text) > max_text_chars:
                    raise InvalidPair(
                        index,
                        f"{part} has {len(text)} characters, and max_text_chars is {max_text_chars}; shorten it, or "
                        "raise that limit",
                    )
                problem = text_problem(text)
                if problem:
                    raise InvalidPair(index, f"{part} {problem}")
                place = places.setdefault(cast(str, text), len(places))
            found.append(place)
    return PairTexts(list(places), np.array(found, dtype=np.int64).reshape(-1, 2))


def candidate_pairs(instruction: str, candidates: Iterable[str]) -> list[Pair]:
    """Pair an instruction with each of its candidates; `check_pairs` has to look at the texts.

        >>> candidate_pairs("Is the sky blue?", ["Yes", "No"])
        [('Is the sky blue?', 'Yes'), ('Is the sky blue?', 'No')]

    Raises InvalidPair if the instruction is not a string, or the candidates are not a collection of texts.
    """
    listed = _listed_candidates(candidates)
    text = plain(instruction)
    if not isinstance(text, str):
        raise InvalidPair(0, f"instruction {text_problem(text)}")
    return [(text, cast(str, plain(candidate))) for candidate in listed]


def plain(value: object) -> object:
    """Make strings, such as numpy's, plain, and turn Arrow scalars into their values.

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


def _rows(pairs: Pairs) -> Iterator[object]:
    """Go through the rows of a table, or of anything else that is iterated over."""
    names = column_names(pairs)
    return _iterated(pairs, WANTED) if names is None else pairs_of_table(pairs, names)


def _listed_candidates(candidates: Iterable[str]) -> list[object]:
    """List the candidates. Refuse a table: it is iterated over, but not by rows."""
    wanted, names = "candidates must be a list of strings", column_names(candidates)
    if names is not None:
        one = names[0] if len(names) == 1 else "response"
        raise InvalidPair(
            0,
            f"{wanted}, got {type(candidates).__name__} with the columns {shown(names)}; pass one of its columns, as "
            f"in table[{one!r}]",
        )
    return list(_iterated(candidates, wanted))


def _iterated(values: object, wanted: str) -> Iterator[object]:
    """Go through `values`. Refuse a text, which is iterated over, and what is not."""
    if isinstance(values, str):
        raise InvalidPair(0, f"{wanted}, got one str: {values[:40]!r}")
    try:
        if not isinstance(values, (bytes, bytearray, memoryview)):
            return iter(cast(Iterable[object], values))
    except TypeError:
        pass
    raise InvalidPair(0, f"{wanted}, got {described(values)}")


def _two(index: int, pair: object) -> Sequence[object]:
    """Return the two parts of a pair."""
    if type(pair) in (tuple, list) and len(cast(Sized, pair)) == 2:
        return cast(Sequence[object], pair)
    row = plain(pair)
    if isinstance(row, Mapping):
        return _two_fields(index, row)
    length = _length(row)
    if length == 2:
        return _in_order(index, row)
    if length is not None and length > 2 and (names := row_names(row)):
        return _among_names(index, row, names)
    problem = f"expected a tuple (instruction, response), got {described(row)}"
    if isinstance(row, str):
        raise InvalidPair(index, f"{problem}; one pair alone is [(instruction, response)]")
    raise InvalidPair(index, problem if length is None else f"{problem} of length {length}")


def _two_fields(index: int, row: Mapping[object, object]) -> list[object]:
    """Return the two parts of a dict, such as a line of JSON: by their names, whatever else it holds."""
    if INSTRUCTION in row and RESPONSE in row:
        return [row[INSTRUCTION], row[RESPONSE]]
    raise InvalidPair(
        index,
        f"expected a tuple (instruction, response), got {type(row).__name__} with the fields {shown(list(row))}; name "
        f"two of them {INSTRUCTION!r} and {RESPONSE!r}",
    )


def _in_order(index: int, row: object) -> list[object]:
    """Return the parts of a row of two, the instruction first: by its names, if they are the other way round."""
    parts, names = list(cast(Iterable[object], row)), row_names(row)
    if names == [RESPONSE, INSTRUCTION]:
        return parts[::-1]
    if len(names) == 2 and (names[0] == RESPONSE or names[1] == INSTRUCTION):
        raise InvalidPair(
            index,
            f"expected a tuple (instruction, response), got {type(row).__name__} with the names {shown(names)}; name "
            f"its parts {INSTRUCTION!r} and {RESPONSE!r}",
        )
    return parts


def _among_names(index: int, row: object, names: Sequence[object]) -> list[object]:
    """Return the two parts of a row of more, such as one of a query: by their names, whatever else it holds."""
    parts = list(cast(Iterable[object], row))
    if len(parts) == len(names) and names.count(INSTRUCTION) == names.count(RESPONSE) == 1:
        return [parts[names.index(INSTRUCTION)], parts[names.index(RESPONSE)]]
    raise InvalidPair(
        index,
        f"expected a tuple (instruction, response), got {type(row).__name__} with the names {shown(names)}; name two "
        f"of them {INSTRUCTION!r} and {RESPONSE!r}",
    )


def _length(row: object) -> int | None:
    """Count the parts of a row; None for what is not one: texts, tables, and what has no order."""
    is_ordered = hasattr(row, "__getitem__") and not isinstance(row, (str, bytes, bytearray, memoryview))
    if not is_ordered or column_names(row) is not None:
        return None
    try:
        return len(row)  # type: ignore[arg-type]
    except TypeError:  # numpy's array of no dimension
        return None
