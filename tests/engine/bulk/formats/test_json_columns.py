"""Rows of JSON become columns, and rows of columns JSON, without loss; or they are refused, with their place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.errors import CappyError, InvalidLine
from tests.support.bulk_files import run
from tests.support.scored_lines import line_of

pytest.importorskip("pyarrow")


def columns_of(
    scorer: Scorer, folder: Path, rows: list[dict[str, Any]], *,
    window: int = 64, on_error: str = "stop", force: bool = True, **target: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write rows of JSON as Parquet, and read what was written, without the scores."""
    import pyarrow.parquet as pq

    source = folder / "in.jsonl"
    source.write_bytes(b"".join([line_of(**row) for row in rows]))
    run(scorer, source, folder / "out.parquet", options=RowOptions(on_error, window=window), force=force, **target)
    added = ["instruction", "response", "score", "score_truncated"]
    found: list[dict[str, Any]] = pq.read_table(folder / "out.parquet").drop_columns(added).to_pylist()
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{}, {"n": 7}], [{"n": None}, {"n": 7}]),
        ([{"b": 1}, {"a": 2}], [{"b": 1, "a": None}, {"b": None, "a": 2}]),
        ([{"m": {"a": 1}}, {"m": {"b": 2}}], [{"m": {"a": 1, "b": None}}, {"m": {"a": None, "b": 2}}]),
        ([{"m": [{"a": 1}]}, {"m": [None, {"b": 2}]}], None),
        ([{"m": None}, {"m": "x"}], [{"m": None}, {"m": "x"}]),
        ([{"m": 1}, {"m": 2.5}], [{"m": 1.0}, {"m": 2.5}]),
        ([{"n": []}, {"n": [None, 1]}, {"n": [2.5]}], [{"n": []}, {"n": [None, 1.0]}, {"n": [2.5]}]),
    ],
)
def test_the_columns_are_all_fields_of_the_first_window(
    rows: list[dict[str, Any]], expected: list[dict[str, Any]] | None, tmp_path: Path, scorer: Scorer
) -> None:
    nested = [{"m": [{"a": 1, "b": None}]}, {"m": [None, {"a": None, "b": 2}]}]
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
        ({"n": 1.5}, {"n": True}, r"does not fit .* \(n is bool, its column double\)"),
        ({"n": True}, {"n": 1.5}, r"does not fit .* \(n is double, its column bool\)"),
        ({"n": [1.5]}, {"n": [1.5, None, False]}, "does not fit"),
        ({"n": {"a": True}}, {"n": {"a": 1.5}}, r"does not fit .* \(n.a is double, its column bool\)"),
        ({"n": [{"a": 1.5}]}, {"n": [{"a": 2.5}, {"a": True}]}, r"does not fit .* \(n.a is bool, its column double"),
        ({"n": {"a": 1}}, {"n": {}}, r"does not fit .* \(n holds an object without fields\)"),
        ({"n": {"a": {"b": 1}}}, {"n": {"a": {}}}, r"does not fit .* \(n.a holds an object without fields\)"),
        ({"n": [{"a": 1}]}, {"n": [{"a": 2}, {}]}, r"does not fit .* \(n holds an object without fields\)"),
        ({"n": 1}, {"n": 1, "\ud800": 1}, r"has a field '\\ud800', which rows before it have not"),
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"n": {}}, {"n": {"a": 1}}),
        ({"n": {"a": {}}}, {"n": {"a": {"b": 1}}}),
        ({"n": [1.5, True]}, {"n": [1.5]}),
        ({"n": [{"a": True}, {"a": 0.0}]}, {"n": [{"a": True}]}),
    ],
)
def test_a_row_that_fits_into_no_column_gives_none_its_type(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path, scorer: Scorer
) -> None:
    with pytest.raises(InvalidLine, match=r"^line 1: does not fit"):
        columns_of(scorer, tmp_path, [first, second])
    for rows in ([first, second, second], [second, first, second]):
        bad = tmp_path / "bad.jsonl"
        assert columns_of(scorer, tmp_path, rows, on_error="skip", rejects=bad) == [second, second]


@pytest.mark.parametrize("levels", [32, 33, 90, 500, 900])
@pytest.mark.parametrize("is_list", [False, True])
def test_what_is_nested_deeper_than_arrow_reads_is_a_bad_row(
    is_list: bool, levels: int, tmp_path: Path, scorer: Scorer
) -> None:
    value: Any = 1
    for _ in range(levels):
        value = [value] if is_list else {"a": value}
    if levels > 32:
        for rows in ([{"n": value}], [{"n": [1]}, {"n": value}]):
            with pytest.raises(InvalidLine, match=rf"^line {len(rows)}: does not fit .*nested deeper than 32 levels"):
                columns_of(scorer, tmp_path, rows)
    else:
        assert columns_of(scorer, tmp_path, [{"n": value}]) == [{"n": value}]


def test_rows_that_do_not_fit_are_refused_as_other_bad_rows_are(tmp_path: Path, scorer: Scorer) -> None:
    rows: list[dict[str, Any]] = [{"n": number} for number in range(20)]
    rows[3], rows[11], rows[17] = {"n": "x"}, {"n": [1]}, {"late": 1}
    bad = tmp_path / "bad.jsonl"
    found = columns_of(scorer, tmp_path, rows, on_error="skip", window=8, rejects=bad)
    assert [row["n"] for row in found] == [n for n in range(20) if n not in (3, 11, 17)]
    rejects = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [each["line"] for each in rejects] == [4, 12, 18]
    assert [json.loads(each["text"]).get("n") for each in rejects] == ["x", [1], None]
    assert "has a field 'late', which rows before it have not" in rejects[2]["error"]


def test_the_rows_before_one_that_does_not_fit_are_kept_and_go_on_behind_it(tmp_path: Path, scorer: Scorer) -> None:
    rows: list[dict[str, Any]] = [{"n": number} for number in range(20)]
    rows[11] = {"n": "x"}
    with pytest.raises(InvalidLine, match=r"^line 12: does not fit"):
        columns_of(scorer, tmp_path, rows, window=8)
    assert (tmp_path / "out.parquet.partial").stat().st_size
    found = columns_of(
        scorer, tmp_path, rows, on_error="skip", window=8, rejects=tmp_path / "bad.jsonl", resume=True, force=False
    )
    assert [row["n"] for row in found] == [n for n in range(20) if n != 11]


def test_nothing_is_left_where_the_first_row_does_not_fit(tmp_path: Path, scorer: Scorer) -> None:
    with pytest.raises(InvalidLine, match=r"^line 1: does not fit"):
        columns_of(scorer, tmp_path, [{"m": {}}])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# From columns to JSON


def table_of(path: Path, column: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = list(map(str, range(len(column))))
    pq.write_table(pa.table({"instruction": texts, "response": texts, "n": column}), path, row_group_size=5)
    return path


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        (1.5, NAN, "n holds nan, which JSON does not have; choose a .parquet output"),
        ([1.5, None], [1.0, -INFINITE], "n holds -inf, which JSON does not have; choose a .parquet output"),
        ({"a": [{"b": 1.5}]}, {"a": [{"b": INFINITE}]}, "n holds inf, which JSON does not have; choose a .parquet"),
        (b"x", b"\xff", "n is not UTF-8 (invalid start byte)"),
    ],
)
def test_rows_of_a_table_that_json_cannot_hold_are_refused(
    good: Any, bad: Any, problem: str, tmp_path: Path, scorer: Scorer
) -> None:
    import pyarrow as pa

    column = pa.array([good, None, *[bad, good] * 5])
    if isinstance(good, bytes):
        column = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
    source, out, rejects = table_of(tmp_path / "in.parquet", column), tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    run(scorer, source, tmp_path / "out.parquet")
    with pytest.raises(InvalidLine, match=f"^row 3: {re.escape(problem)}"):
        run(scorer, source, out)
    run(scorer, source, out, options=RowOptions("skip", window=4), rejects=rejects, force=True)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in found] == [*found_of(good)[:1], None, *found_of(good)]
    assert [json.loads(line)["row"] for line in rejects.read_text().splitlines()] == [3, 5, 7, 9, 11]


def found_of(good: Any) -> list[Any]:
    return [good.decode() if isinstance(good, bytes) else good] * 5


@pytest.mark.parametrize(
    "kind",
    ["binary", "timestamp", "list of binary", "struct of date", "dictionary of binary", "x twice", "list of x twice"],
)
def test_columns_that_json_cannot_hold_are_an_error_before_anything_is_scored(
    kind: str, tmp_path: Path, scorer: Scorer
) -> None:
    import pyarrow as pa

    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    columns = {
        "binary": pa.array([b"x"]),
        "timestamp": pa.array([1], pa.timestamp("us")),
        "list of binary": pa.array([[b"x"]]),
        "struct of date": pa.array([{"a": 1}], pa.struct([("a", pa.date32())])),
        "dictionary of binary": pa.array([b"x"]).dictionary_encode(),
        "x twice": twice,
        "list of x twice": pa.ListArray.from_arrays([0, 1], twice),
    }
    source = table_of(tmp_path / "in.parquet", columns[kind])
    with pytest.raises(
        CappyError, match=r"the column 'n' holds .*, which JSON does not have; choose a .parquet output"
    ):
        run(scorer, source, tmp_path / "out.jsonl", options=RowOptions("skip"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_columns_that_json_can_hold_are_written(tmp_path: Path, scorer: Scorer) -> None:
    import pyarrow as pa

    columns: list[tuple[Any, list[Any]]] = [
        (pa.array([1, 2], pa.uint64()), [1, 2]),
        (pa.array([0.5, None], pa.float16()), [0.5, None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array([[("k", 1.5)], None], pa.map_(pa.string(), pa.float64())), [[["k", 1.5]], None]),
        (pa.array([None, None]), [None, None]),
        (pa.array([[True, False], []], pa.large_list(pa.bool_())), [[True, False], []]),
    ]
    for column, expected in columns:
        run(scorer, table_of(tmp_path / "in.parquet", column), tmp_path / "out.jsonl", force=True)
        assert [json.loads(line)["n"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected
