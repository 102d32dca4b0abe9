"""Fit rows of JSON into columns of Arrow, without loss: the columns are those of the first rows.

Arrow itself cuts 2.5 to 2 where a column holds integers, takes a text for a list of letters, and leaves out fields that
it has no column for. So the types of new rows are compared with those of the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""What Arrow raises for values that it cannot put into one column."""

Row = Mapping[str, Any]
Type = Any
"""A pyarrow.DataType."""
Schema = Any
"""A pyarrow.Schema."""
Table = Any
"""A pyarrow.Table."""


def schema_of(rows: Sequence[Row]) -> Schema:
    """Find the columns for rows of JSON: all of their fields, with the types of the first rows that agree.

    >>> schema_of([{"instruction": "Is it?"}, {"id": 7}]).names
    ['instruction', 'id']
    """
    return pa.schema([(name, _type_of(_values(rows, name))) for name in _names(rows)])


def problems_of(rows: Sequence[Row], schema: Schema) -> dict[int, str]:
    """Say by the places of rows that do not fit into columns why they do not.

    >>> problems_of([{"id": 7}, {"id": "x"}], schema_of([{"id": 1}]))
    {1: 'does not fit into the columns of the rows before it (id is string, its column int64); choose a .jsonl output'}
    """
    found: dict[int, str] = {}
    for name in _names(rows):
        if name not in schema.names:
            places: Iterable[tuple[int, str]] = ((place, _late(name)) for place, row in enumerate(rows) if name in row)
        else:
            places = _unfit(_values(rows, name), name, schema.field(name).type, 0)
        for place, problem in places:
            found.setdefault(place, problem)
    return found


def table_of(rows: Sequence[Row], schema: Schema) -> Table:
    """Make a table of rows that fit into its columns.

    >>> table_of([{"id": 7}], schema_of([{"id": 1}])).num_rows
    1
    """
    return pa.table([pa.array(_values(rows, each.name), each.type) for each in schema], schema)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def _type_of(values: Sequence[Any]) -> Type:
    """Find the type of values; where they have several, the one of the first half or quarter that has one."""
    try:
        kind = pa.array(values).type
        return kind if not _has_empty(kind) else pa.null()
    except UNFIT:
        if len(values) == 1:
            return pa.null()
    middle = len(values) // 2
    kind = _type_of(values[:middle])
    return kind if not pa.types.is_null(kind) else _type_of(values[middle:])


def _unfit(values: Sequence[Any], name: str, kind: Type, first: int) -> Iterator[tuple[int, str]]:
    """Find the values that do not fit: all of them are tried at once, else their halves."""
    try:
        found = pa.array(values).type
        problem = _difference(found, kind, name)
        if not problem:
            if found != kind:
                pa.array(values, kind)
            return
    except UNFIT as error:
        problem = _misfit(f"{name}: {error}")
    if len(values) == 1:
        yield first, problem
        return
    middle = len(values) // 2
    yield from _unfit(values[:middle], name, kind, first)
    yield from _unfit(values[middle:], name, kind, first + middle)


def _difference(found: Type, kind: Type, name: str) -> str:
    """Say why values of one type do not fit into a column of another; empty if they do."""
    if pa.types.is_null(found) or (pa.types.is_int64(found) and pa.types.is_float64(kind)):
        return ""
    if pa.types.is_list(found) and pa.types.is_list(kind):
        return _difference(found.value_type, kind.value_type, name)
    if pa.types.is_struct(found) and pa.types.is_struct(kind):
        for each in found:
            place = kind.get_field_index(each.name)
            inner = f"{name}.{each.name}"
            problem = _late(inner) if place < 0 else _difference(each.type, kind.field(place).type, inner)
            if problem:
                return problem
        return ""
    if _has_empty(found):
        return _misfit(f"{name} holds an object without fields")
    return "" if found == kind else _misfit(f"{name} is {found}, its column {kind}")


def _has_empty(kind: Type) -> bool:
    """True for a type that Parquet does not have: a struct without fields, or of one."""
    if pa.types.is_list(kind):
        return _has_empty(kind.value_type)
    return pa.types.is_struct(kind) and (not kind.num_fields or any(_has_empty(each.type) for each in kind))


def _late(name: str) -> str:
    return f"has a field {name!r}, which rows before it have not; choose a .jsonl output"


def _misfit(why: str) -> str:
    return f"does not fit into the columns of the rows before it ({why}); choose a .jsonl output"
