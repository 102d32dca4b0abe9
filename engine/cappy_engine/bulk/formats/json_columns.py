"""Fit rows of JSON into columns of Arrow, and columns into JSON, without loss.

The columns for rows of JSON are those of the first rows.

Arrow itself cuts 2.5 to 2 where a column holds integers, takes a text for a list of letters and true for 1, and leaves
out fields that it has no column for. So the classes of Python's values are compared with the columns, many at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cappy_engine.errors import CappyError
from cappy_engine.pairs import text_problem

UNFIT = (pa.ArrowException, TypeError, ValueError, OverflowError)
"""What Arrow raises for values that it cannot put into one column."""

HELD: tuple[tuple[Callable[[Any], bool], set[type]], ...] = (
    (pa.types.is_boolean, {bool}),
    (pa.types.is_floating, {int, float}),
    (pa.types.is_integer, {int}),
    (pa.types.is_string, {str}),
    (pa.types.is_list, {list}),
    (pa.types.is_struct, {dict}),
)
"""The classes of values that columns hold without loss, by their types; all hold None."""
TYPES = {bool: "bool", float: "double", int: "int64", str: "string", list: "list", dict: "struct"}
"""What Arrow calls the types of values."""

MOST_LEVELS = 32
"""Lists and objects in one another, of which Arrow reads and writes 64, and half as many lists from Parquet."""

Row = Mapping[str, Any]
Type = Any
"""A pyarrow.DataType."""
Schema = Any
"""A pyarrow.Schema."""
Table = Any
"""A pyarrow.Table."""
Batch = Any
"""A pyarrow.RecordBatch."""
Column = Any
"""A pyarrow.Array."""


def schema_of(rows: Sequence[Row]) -> Schema:
    """Find the columns for rows of JSON. They are all fields, with the types of the first rows that agree.

    >>> schema_of([{"instruction": "Is it?"}, {"id": 7}]).names
    ['instruction', 'id']
    """
    names = [name for name in _names(rows) if text_problem(name) is None]
    return pa.schema([(name, _type_of(_values(rows, name))) for name in names])


def problems_of(rows: Sequence[Row], schema: Schema) -> dict[int, str]:
    """Find the rows that do not fit into columns: their places, and why.

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


def check_json(schema: Schema) -> None:
    """Raise CappyError if JSON does not have the type of a column.

    >>> check_json(schema_of([{"instruction": "Is it?"}]))
    """
    for each in schema:
        if not _is_json(each.type):
            raise CappyError(
                f"the column {each.name!r} holds {each.type}, which JSON does not have; choose a .parquet output"
            )


def json_problems_of(batch: Batch) -> dict[int, str]:
    """Find the rows with values that JSON does not have: NaN, infinities, texts that are not UTF-8.

    >>> json_problems_of(pa.record_batch({"n": [1.5, float("nan")]}))
    {1: 'n holds nan, which JSON does not have; choose a .parquet output'}
    """
    found: dict[int, str] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if not (_is_valid(column) and _is_finite(column)):  # else nothing becomes a value of Python
            for place, scalar in enumerate(column):
                problem = _json_problem(scalar, name)
                if problem:
                    found.setdefault(place, problem)
    return found


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def _type_of(values: Sequence[Any]) -> Type:
    """Find the type of values. If they have several, it is that of the first half or quarter that has one."""
    return _common([value for value in values if not _typeless(value, "")])


def _common(values: Sequence[Any]) -> Type:
    try:
        kind = pa.array(values).type
        if not _difference(values, kind, ""):
            return kind
    except UNFIT:
        pass
    if len(values) == 1:
        return pa.null()
    middle = len(values) // 2
    kind = _common(values[:middle])
    return kind if not pa.types.is_null(kind) else _common(values[middle:])


def _typeless(value: Any, name: str, levels: int = MOST_LEVELS) -> str:
    """Say why Parquet has no type for a value; empty if it has one."""
    if type(value) not in (dict, list):
        return ""
    if not levels:
        return _misfit(f"nested deeper than {MOST_LEVELS} levels")
    if type(value) is list:
        inner = [(name, each) for each in value] if {dict, list} & set(map(type, value)) else []
    else:
        inner = [(f"{name}.{key}", each) for key, each in value.items()]
        if not inner:
            return _empty(name)
    return next((found for path, each in inner if (found := _typeless(each, path, levels - 1))), "")


def _unfit(values: Sequence[Any], name: str, kind: Type, first: int) -> Iterator[tuple[int, str]]:
    """Find the values that do not fit. All of them are tried at once, else their halves."""
    try:
        problem = _difference(values, kind, name)
        if not problem:
            pa.array(values, kind)
            return
    except UNFIT as error:
        problem = _misfit(f"{name}: {error}")
    if len(values) == 1:
        yield first, _typeless(values[0], name) or problem
        return
    middle = len(values) // 2
    yield from _unfit(values[:middle], name, kind, first)
    yield from _unfit(values[middle:], name, kind, first + middle)


def _difference(values: Sequence[Any], kind: Type, name: str) -> str:
    """Say why a column does not hold one of the values, at any depth. Empty if it holds all."""
    classes = set(map(type, values)) - {type(None)}
    inner = [value for value in values if value is not None] if classes & {list, dict} else []
    if dict in classes and not all(value for value in inner if type(value) is dict):
        return _empty(name)
    held = next((each for is_kind, each in HELD if is_kind(kind)), set())
    for other in TYPES:
        if other in classes - held:
            return _misfit(f"{name} is {TYPES[other]}, its column {kind}")
    if list in classes:
        return _difference([each for value in inner for each in value], kind.value_type, name)
    for each in kind if dict in classes else ():
        problem = _difference([value.get(each.name) for value in inner], each.type, f"{name}.{each.name}")
        if problem:
            return problem
    names = {each.name for each in kind} if dict in classes else set()
    late = next((each for value in inner for each in value if each not in names), None)
    return "" if late is None else _late(f"{name}.{late}")


def _late(name: str) -> str:
    return f"has a field {name!r}, which rows before it have not; choose a .jsonl output"


def _empty(name: str) -> str:
    return _misfit(f"{name} holds an object without fields")


def _misfit(why: str) -> str:
    return f"does not fit into the columns of the rows before it ({why}); choose a .jsonl output"


def _is_json(kind: Type) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_json(kind.value_type)
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return len({each.name for each in fields}) == len(fields) and all(_is_json(each.type) for each in fields)
    plain = (
        pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating,
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    )  # fmt: skip
    return any(is_kind(kind) for is_kind in plain)


def _is_valid(column: Column) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _is_finite(column: Column) -> bool:
    """True if no number of a column, at any depth, is NaN or infinite. All are looked at together."""
    kind = column.type
    if pa.types.is_floating(kind):
        return pc.all(pc.is_finite(column.cast(pa.float64()))).as_py() is not False
    if pa.types.is_dictionary(kind):
        return _is_finite(column.dictionary)
    if pa.types.is_map(kind):
        return _is_finite(column.keys) and _is_finite(column.items)
    if pa.types.is_struct(kind):
        return all(map(_is_finite, column.flatten()))
    return not pa.types.is_nested(kind) or _is_finite(column.flatten())


def _json_problem(scalar: Any, name: str) -> str:
    try:
        value = scalar.as_py()
    except UnicodeDecodeError as error:
        return f"{name} is not UTF-8 ({error.reason})"
    number = _not_finite(value)
    return "" if number is None else f"{name} holds {number}, which JSON does not have; choose a .parquet output"


def _not_finite(value: Any) -> float | None:
    """Find a number in a value that is NaN or infinite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for each in inner if (found := _not_finite(each)) is not None), None)
