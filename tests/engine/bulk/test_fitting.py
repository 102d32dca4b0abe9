"""Rows of JSON become columns without loss, or are errors with their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.errors import InvalidLine
from cappy_engine.testing import fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import run
from tests.support.scored_lines import line_of

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def scorer(tokenizer: PairTokenizer) -> Scorer:
    return fake_scorer(tokenizer=tokenizer)


def columns_of(scorer: Scorer, folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Write rows of JSON as Parquet, and read what was written, without the scores."""
    import pyarrow.parquet as pq

    source = folder / "in.jsonl"
    source.write_bytes(b"".join([line_of(**row) for row in rows]))
    run(scorer, source, folder / "out.parquet", options=RowOptions(**options), force=True)
    added = ["instruction", "response", "score", "score_truncated"]
    found: list[dict[str, Any]] = pq.read_table(folder / "out.parquet").drop_columns(added).to_pylist()
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{}, {"n": 7}], [{"n": None}, {"n": 7}]),
        ([{"b": 1}, {"a": 2}], [{"b": 1, "a": None}, {"b": None, "a": 2}]),
        ([{"m": {"a": 1}}, {"m": {"b": 2}}], [{"m": {"a": 1, "b": None}}, {"m": {"a": None, "b": 2}}]),
        ([{"m": [{"a": 1}]}, {"m": [{}, {"b": 2}]}], None),
        ([{"m": None}, {"m": "x"}], [{"m": None}, {"m": "x"}]),
        ([{"m": 1}, {"m": 2.5}], [{"m": 1.0}, {"m": 2.5}]),
        ([{"m": {"a": 1}}, {"m": {}}], [{"m": {"a": 1}}, {"m": {"a": None}}]),
    ],
)
def test_the_columns_are_all_fields_of_the_first_window(
    rows: list[dict[str, Any]], expected: list[dict[str, Any]] | None, tmp_path: Path, scorer: Scorer
) -> None:
    nested = [{"m": [{"a": 1, "b": None}]}, {"m": [{"a": None, "b": None}, {"a": None, "b": 2}]}]
    assert columns_of(scorer, tmp_path, rows) == (expected or nested)


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ({"n": 1}, {"n": "x"}, "does not fit into the columns of the rows before it"),
        ({"n": 1}, {"n": True}, "does not fit"),
        ({"n": True}, {"n": 1}, "does not fit"),
        ({"n": "x"}, {"n": ["x"]}, "does not fit"),
        ({"n": ["x"]}, {"n": "xy"}, "does not fit"),
        ({"n": {"a": 1}}, {"n": []}, "does not fit"),
        ({"n": []}, {"n": {}}, "does not fit"),
        ({"n": [1]}, {"n": [[1]]}, "does not fit"),
        ({"n": {"a": {"c": 1}}}, {"n": {"a": {"c": "x"}}}, "does not fit"),
        ({"n": 1.5}, {"n": 2**53 + 1}, "does not fit"),
        ({"n": 1}, {"n": 2**64}, "does not fit"),
        ({"n": "x"}, {"n": "\ud800"}, "does not fit"),
        ({"n": 1}, {"n": {}}, "does not fit"),
    ],
)
def test_a_row_of_other_types_is_an_error_whichever_window_it_is_in(
    window: int, first: dict[str, Any], second: dict[str, Any], problem: str, tmp_path: Path, scorer: Scorer
) -> None:
    with pytest.raises(InvalidLine, match=f"^line 2: {problem}"):
        columns_of(scorer, tmp_path, [first, second], window=window)


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ({}, {"n": 1}, "has a field 'n', which rows before it have not; choose a .jsonl output"),
        ({"m": {"a": 1}}, {"m": {"a": 1, "b": 2}}, "has a field 'm.b', which rows before it have not"),
        ({"m": [{"a": 1}]}, {"m": [{"a": 1}, {"b": 2}]}, "has a field 'm.b', which rows before it have not"),
        (
            {"n": 1},
            {"n": 2.5},
            r"does not fit into the columns .* \(n is double, its column int64\)",
        ),
        ({"n": None}, {"n": "x"}, r"does not fit into .* \(n is string, its column null\)"),
        ({"n": [1]}, {"n": [2.5]}, "does not fit"),
        ({"n": {"a": 1}}, {"n": {"a": 2.5}}, "does not fit"),
    ],
)
def test_what_comes_behind_the_first_window_and_has_no_column_is_an_error(
    first: dict[str, Any], second: dict[str, Any], problem: str, tmp_path: Path, scorer: Scorer
) -> None:
    with pytest.raises(InvalidLine, match=f"^line 2: {problem}"):
        columns_of(scorer, tmp_path, [first, second], window=1)


def test_the_other_rows_of_a_window_give_a_column_its_type(tmp_path: Path, scorer: Scorer) -> None:
    with pytest.raises(InvalidLine, match=r"^line 3: does not fit .*n is string, its column int64"):
        columns_of(scorer, tmp_path, [{"n": 1}, {"n": 2}, {"n": "x"}, {"late": 1}])
    with pytest.raises(InvalidLine, match=r"^line 1: does not fit"):
        columns_of(scorer, tmp_path, [{"n": 2**64}, {"n": 2}])


@pytest.mark.parametrize("value", [{}, [{}], {"a": {}}])
def test_an_object_without_fields_is_an_error_before_the_rows_are_scored(
    value: object, tmp_path: Path, scorer: Scorer
) -> None:
    with pytest.raises(InvalidLine, match=r"^line 1: does not fit .*an object without fields"):
        columns_of(scorer, tmp_path, [{"m": value}])
