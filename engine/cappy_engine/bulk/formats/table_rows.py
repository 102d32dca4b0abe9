"""Take rows and values from a table's batches, and gather small batches into larger ones.

Does not import pyarrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

UNSHARED = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
"""In these encodings of Parquet every text has its own bytes."""

Part = TypeVar("Part")


def shares_texts(group: Any) -> bool:
    """Tell if rows of a row group may share the bytes of a text.

    Then the size of the group tells little about the sizes of its rows.

    >>> shares_texts(file.metadata.row_group(0))
    True
    """
    columns = (group.column(place) for place in range(group.num_columns))
    return any(each.physical_type == "BYTE_ARRAY" and not UNSHARED.issuperset(each.encodings) for each in columns)


def gathered(
    parts: Iterator[Part], sizes_of: Callable[[Part], tuple[int, ...]], most: tuple[int, ...]
) -> Iterator[list[Part]]:
    """Yield parts in groups. In a group no sum of sizes is more than its limit in `most`. A larger part is alone.

    >>> list(gathered(iter("abcdef"), lambda part: (1, 100), most=(4, 300)))
    [['a', 'b', 'c'], ['d', 'e', 'f']]
    """
    kept: list[Part] = []
    sums: tuple[int, ...] = ()
    for part in parts:
        sizes = sizes_of(part)
        together = tuple(map(sum, zip(sums, sizes, strict=True))) if kept else sizes
        if kept and any(size > limit for size, limit in zip(together, most, strict=True)):
            yield kept
            kept, together = [], sizes
        kept.append(part)
        sums = together
    if kept:
        yield kept


def values_of(batch: Any, name: str) -> list[Any]:
    """List a column's values as Python's. A text that is not UTF-8 is a UnicodeDecodeError in its place.

    >>> values_of(batch, "response")
    ['Yes', None]
    """
    column = batch.column(name)
    try:
        return cast("list[Any]", column.to_pylist())
    except UnicodeDecodeError:
        return [_value(each) for each in column]


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """List a batch's rows as dictionaries, by the names of columns."""
    return cast("list[dict[str, Any]]", batch.to_pylist())


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
