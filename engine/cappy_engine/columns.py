"""Read two columns of a table as pairs: pandas, polars, Arrow, datasets, or a dict of columns. Imports none of these.

A column is gone through once, some thousand texts at a time, and never becomes a Python list.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain
from typing import Any, Protocol

from cappy_engine.checks import described, shown
from cappy_engine.errors import InvalidPair

INSTRUCTION, RESPONSE = "instruction", "response"
ROWS_AT_A_TIME = 4096
"""Rows that become Python strings at once: Arrow's one by one take five times as long."""
WANTED = "expected (instruction, response) pairs"


class Table(Protocol):
    """A table that gives itself to Arrow: a DataFrame of pandas or polars, a table of pyarrow."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """Give a stream of the table's rows."""


def column_names(values: object) -> list[object] | None:
    """Name the columns of a table, which iterates over them; None for what is not one.

    >>> column_names({"instruction": ["Is the sky blue?"], "response": ["Yes"]})
    ['instruction', 'response']
    """
    if isinstance(values, Mapping):
        return list(values)
    for attribute in ("column_names", "columns"):
        names = getattr(values, attribute, None)
        if isinstance(names, Iterable) and not isinstance(names, str):
            return list(names)
    return None


def pairs_of_table(table: Any, names: list[object]) -> Iterator[tuple[object, object]]:
    """Yield the pairs of a table's rows: of the columns `instruction` and `response`, else of its only two.

        >>> list(pairs_of_table({"question": ["Is it?"], "answer": ["Yes"]}, ["question", "answer"]))
        [('Is it?', 'Yes')]

    Raises InvalidPair for a table without such columns, for columns that have no order or are not of one length, and
    for several tables in a dict.
    """
    if isinstance(table, Mapping) and hasattr(table, "with_format"):  # a DatasetDict of datasets
        example = f"table[{next(iter(names), 'train')!r}]"
        problem = f"got {type(table).__name__} with the splits {shown(names)}; choose one of them, as in {example}"
        raise InvalidPair(0, f"{WANTED}, {problem}")
    if hasattr(table, "with_format"):  # of datasets, whose own columns take 20 to 70 times as long as Arrow's
        if not _is_arrow(table):
            return _pairs_of_batches(table)
        table = table.with_format("arrow")
    first, second = _choose(table, names)
    columns = [_column(table, name) for name in (first, second)]
    counts = [len(column) for column in columns if isinstance(column, Sized)]
    if len(counts) == 2 and counts[0] != counts[1]:
        problem = f"column {first!r} has {counts[0]} rows, and {second!r} has {counts[1]}"
        raise InvalidPair(min(counts), problem)
    return zip(*map(_texts, columns), strict=True)


def row_names(row: object) -> list[object]:
    """Name the parts of one row: of a named tuple, of numpy, pandas or SQLite; empty for a row without names.

    >>> row_names(next(frame.itertuples(index=False)))
    ['response', 'instruction']
    """
    names = getattr(row, "_fields", None) or getattr(getattr(row, "dtype", None), "names", None)
    if names is None and callable(keys := getattr(row, "keys", None)):
        names = keys()
    return list(names) if isinstance(names, Iterable) else []


def _is_arrow(table: Any) -> bool:
    """False for a dataset whose rows are not what its Arrow table holds: transformed ones, and streams."""
    how = getattr(table, "format", None)
    return isinstance(table, Sized) and not (isinstance(how, Mapping) and how.get("type") == "custom")


def _pairs_of_batches(table: Any) -> Iterator[tuple[object, object]]:
    """Yield the pairs of a dataset's rows as it gives them. The rows may have other columns than it names."""
    for batch in table.iter(ROWS_AT_A_TIME):
        yield from pairs_of_table(batch, column_names(batch) or [])


def _choose(table: object, names: list[object]) -> tuple[object, object]:
    """Choose the columns of instructions and of responses."""
    if names.count(INSTRUCTION) == names.count(RESPONSE) == 1:
        return INSTRUCTION, RESPONSE
    # Two columns are taken in their order, unless a name says that it is the other way round.
    if len(set(names)) == len(names) == 2 and names[0] != RESPONSE and names[1] != INSTRUCTION:
        return names[0], names[1]
    raise InvalidPair(
        0,
        f"{WANTED}, got {type(table).__name__} with the columns {shown(names)}; name two of them {INSTRUCTION!r} and "
        f"{RESPONSE!r}, or pass a table of these two alone, in this order",
    )


def _column(table: Any, name: object) -> Iterable[object]:
    """Give one column of a table. A text is none, nor a dict or another table: its letters or names would be taken."""
    try:
        column = table[name]
    except TypeError as error:
        raise InvalidPair(
            0, f"{WANTED}, got {type(table).__name__}, which does not give its columns; collect its rows before"
        ) from error
    if isinstance(column, (set, frozenset)):
        what_then = ", which has no order; make a list of it where its order is known"
    elif column_names(column) is not None:
        what_then = "; a column is a list of texts, as in a dict from frame.to_dict('list')"
    elif isinstance(column, (str, bytes, bytearray)) or not isinstance(column, Iterable):
        what_then = ""
    else:
        return column
    raise InvalidPair(0, f"{WANTED}, got a table whose column {name!r} is {described(column)}{what_then}")


def _texts(column: Any) -> Iterator[object]:
    """Go through a column, through its Arrow array where it has one."""
    array: Any = getattr(column, "array", None)  # of pandas
    if hasattr(array, "__arrow_array__"):
        with contextlib.suppress(ImportError, ValueError):  # there is no Arrow, or it does not take these texts
            column = array.__arrow_array__()
    if not (hasattr(column, "to_pylist") and hasattr(column, "slice")):
        return iter(column)
    starts = range(0, len(column), ROWS_AT_A_TIME)
    return chain.from_iterable(column.slice(start, ROWS_AT_A_TIME).to_pylist() for start in starts)
