"""Collections that hold texts as pandas, polars, Arrow and datasets do, without these packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class Series:
    """A column that iterates over its values and is indexed by labels, as a pandas Series that was sorted is."""

    def __init__(self, values: Iterable[object]) -> None:
        self._values = list(values)

    def __iter__(self) -> Iterator[object]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, label: int) -> object:
        return self._values[-1 - label]  # the labels descend

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a Series is ambiguous")


class Frame:
    """A table that iterates over the names of its columns, as a pandas DataFrame does."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> Series:
        raise TypeError("this table was not collected")

    def __repr__(self) -> str:
        return "\n".join(["a table", "of several lines"] * 20)


class ArrowColumn:
    """A column that gives its values in slices, as Arrow's do; one by one they would not be Python's."""

    def __init__(self, values: Iterable[object]) -> None:
        self._values = list(values)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("gone through one by one, which is slow")

    def slice(self, start: int, length: int) -> ArrowColumn:
        return ArrowColumn(self._values[start : start + length])

    def to_pylist(self) -> list[object]:
        return self._values


class ArrowScalar:
    """A value of an Arrow array: Python's is given by `as_py`."""

    def __init__(self, value: object) -> None:
        self._value = value

    def as_py(self) -> object:
        return self._value


class Once:
    """An iterable that can be gone through once, and counts how often that was asked for."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._values = iter(values)
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return self._values
