"""Parquet in and out, and rows of one format in another."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.errors import CappyError, InvalidLine
from tests.support.bulk_files import pairs_of, run, scores_of, stopped, write_rows
from tests.support.scored_lines import LONG, line_of


def test_what_is_written_is_held_in_memory_for_one_row_group_at_a_time(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    from cappy_engine.bulk.formats import tables

    schema, count = pa.schema([("number", pa.int64())]), 10
    out = tmp_path / "out.parquet"
    with (tmp_path / "streams").open("w+b") as streams, out.open("wb") as file:
        for part in range(count):
            numbers = pa.array(range(20_000 * part, 20_000 * (part + 1)))
            streams.write(tables.stream_bytes(pa.table([numbers], schema=schema)))
        tables.write_parquet_of(streams, streams.tell(), file)
    found = pq.ParquetFile(out)
    assert found.read().column("number").to_pylist() == list(range(20_000 * count))
    groups = [found.metadata.row_group(place).num_rows for place in range(found.metadata.num_row_groups)]
    assert groups == [80_000, 80_000, 40_000]


def test_parquet_keeps_its_columns_and_gets_float32_and_bool(tmp_path: Path, scorer: Scorer) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [*pairs_of(30), {"id": "30", "instruction": "q", "response": LONG}]
    table = pa.Table.from_pylist(rows)
    columns = {
        "when": pa.array(range(31), pa.timestamp("us", tz="UTC")),
        "kind": pa.array(["a", None, "b"] * 10 + ["a"]).dictionary_encode(),
        "tags": pa.array([[1], None] * 15 + [[]], pa.list_(pa.int8())),
        "raw": pa.array([b"\xff"] * 31, pa.large_binary()),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    run(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.select(table.column_names).equals(table)
    assert written.schema.field("score").type == pa.float32()
    assert written.schema.field("score_truncated").type == pa.bool_()
    assert written["score"].to_pylist() == scores_of(scorer, rows)
    assert written["score_truncated"].to_pylist() == [False] * 30 + [True]


def test_a_row_group_without_rows_is_passed_over(tmp_path: Path, scorer: Scorer) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(pairs_of(3))
    with pq.ParquetWriter(tmp_path / "in.parquet", table.schema) as writer:
        for part in (table, table.slice(3), table):
            writer.write_table(part)
    assert run(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet").pairs == 6
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ["0", "1", "2"] * 2


@pytest.mark.parametrize("kind", ["string_view", "binary_view"])
def test_rows_behind_a_bad_one_are_kept_in_types_that_pyarrow_cannot_take_rows_of(
    kind: str, tmp_path: Path, scorer: Scorer
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    source, out, rows = tmp_path / "a.parquet", tmp_path / "out.parquet", [0, 2, 3, 6]
    note = pa.array(list("abcdefg"), pa.string()).cast(kind)
    response = ["Yes", None, "No", "Yes", None, None, "Perhaps"]
    pq.write_table(pa.table({"instruction": ["Is it?"] * 7, "response": response, "note": note}), source)
    assert run(scorer, source, out, rejects=tmp_path / "bad.jsonl", options=RowOptions("skip")).refused == 3
    table = pq.read_table(out)
    assert table["note"].type == pq.read_table(source)["note"].type
    assert table["note"].to_pylist() == [note[row].as_py() for row in rows]
    assert table["response"].to_pylist() == [response[row] for row in rows]


def test_pandas_and_polars_read_the_types_that_a_person_expects(tmp_path: Path, scorer: Scorer) -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(pairs_of(10)).assign(weight=0.5)
    frame.to_parquet(tmp_path / "in.parquet")
    run(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")
    read = pandas.read_parquet(tmp_path / "out.parquet")
    assert (read["score"].dtype, read["score_truncated"].dtype) == ("float32", "bool")
    pandas.testing.assert_frame_equal(read[frame.columns], frame)
    schema = polars.read_parquet(tmp_path / "out.parquet").schema
    assert (schema["score"], schema["score_truncated"], schema["weight"]) == (
        polars.Float32, polars.Boolean, polars.Float64,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"instruction": ["q"]}, "no column 'response'; found 'instruction'"),
        ({"instruction": ["q"], "response": [1]}, "the column 'response' holds int64, and must hold texts"),
        ({"instruction": ["q", "q"], "response": ["a", None]}, "^row 2: response must be a str, got NoneType None"),
        ({"instruction": ["q"], "response": [None]}, "^row 1: response must be a str, got NoneType None"),
        ({"instruction": ["q"], "response": ["a"], "score": [1.0]}, "has a column 'score' already"),
    ],
)
def test_a_parquet_file_without_pairs_is_an_error_with_its_place(
    columns: dict[str, Any], problem: str, tmp_path: Path, scorer: Scorer
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(CappyError, match=problem):
        run(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}\n", "cut", "changed"])
def test_a_file_that_is_not_parquet_is_an_error_that_names_it(
    content: bytes | str, tmp_path: Path, scorer: Scorer
) -> None:
    pytest.importorskip("pyarrow")
    source = write_rows(tmp_path / "in.parquet", pairs_of(30))
    whole = source.read_bytes()
    middle = len(whole) // 8
    others = {"cut": whole[:-20], "changed": whole[:middle] + b"\xff" * 99 + whole[middle + 99 :]}
    source.write_bytes(content if isinstance(content, bytes) else others[content])
    with pytest.raises(CappyError, match=r"in\.parquet is (not a complete Parquet file|damaged behind row)"):
        run(scorer, source, tmp_path / "out.parquet")


def test_parquet_without_rows_gives_parquet_without_rows(tmp_path: Path, scorer: Scorer) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    schema = pa.schema([("instruction", pa.string()), ("response", pa.large_string())])
    pq.write_table(schema.empty_table(), tmp_path / "in.parquet")
    assert run(scorer, tmp_path / "in.parquet", tmp_path / "out.parquet").pairs == 0
    written = pq.read_table(tmp_path / "out.parquet")
    assert (written.num_rows, written.column_names) == (0, ["instruction", "response", "score", "score_truncated"])


# From one format to another


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("into", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_of_any_format_become_json_lines_or_parquet(form: str, into: str, tmp_path: Path, scorer: Scorer) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    rows = pairs_of(30)
    out = tmp_path / f"out.{into}"
    run(scorer, write_rows(tmp_path / f"in.{form}", rows), out)
    if into == "parquet":
        found = pq.read_table(out).to_pylist()
        marks = {"score_truncated": False}
    else:
        content = gzip.decompress(out.read_bytes()) if into.endswith("gz") else out.read_bytes()
        found, marks = [json.loads(line) for line in content.splitlines()], {}
    expected = scores_of(scorer, rows)
    assert found == [{**row, "score": score, **marks} for row, score in zip(rows, expected, strict=True)]


def test_rows_of_json_that_do_not_fit_into_columns_are_errors_with_their_line(tmp_path: Path, scorer: Scorer) -> None:
    pytest.importorskip("pyarrow")
    rows = [{**row, "n": int(row["id"])} for row in pairs_of(20)]
    for other, problem in (("x", "does not fit into the columns"), ([1], "does not fit"), (None, "")):
        rows[15]["n"] = other
        source = write_rows(tmp_path / "in.jsonl", rows)
        if problem:
            with pytest.raises(InvalidLine, match=f"^line 16: {problem}"):
                run(scorer, source, tmp_path / "out.parquet", force=True)
        else:
            run(scorer, source, tmp_path / "out.parquet", force=True)


def test_csv_is_made_of_csv_only(tmp_path: Path, scorer: Scorer) -> None:
    source = write_rows(tmp_path / "in.jsonl", pairs_of(3))
    with pytest.raises(CappyError, match="rows of JSON Lines are not written as CSV; choose"):
        run(scorer, source, tmp_path / "out.csv")


# The columns of a run that goes on


@pytest.mark.parametrize("commits", [1, 2, 3])
def test_the_columns_of_a_window_without_good_rows_are_kept_for_a_run_that_goes_on(
    commits: int, tmp_path: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    rows: list[dict[str, Any]] = [{"n": 1, "response": LONG}, {"n": 2, "response": LONG}, {"n": "x"}, {"n": 2}]
    source, out, whole = tmp_path / "in.jsonl", tmp_path / "out.parquet", tmp_path / "whole.parquet"
    source.write_bytes(b"".join([line_of(**row) for row in rows]))
    options = RowOptions("skip", "refuse", window=2)
    run(scorer, source, whole, options=options, rejects=tmp_path / "whole.bad")
    bad = tmp_path / "out.bad"
    stopped(monkeypatch, commits, lambda: run(scorer, source, out, options=options, rejects=bad))
    run(scorer, source, out, options=options, rejects=bad, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert bad.read_bytes() == (tmp_path / "whole.bad").read_bytes()
    assert [json.loads(line)["line"] for line in bad.read_text().splitlines()] == [1, 2, 3]


def test_the_columns_of_a_window_that_ends_in_an_error_are_not_kept(tmp_path: Path, scorer: Scorer) -> None:
    pytest.importorskip("pyarrow")
    sources = [tmp_path / "blank.jsonl", tmp_path / "in.jsonl"]
    sources[0].write_bytes(b"\n")
    sources[1].write_bytes(line_of(n=1) + b"oops\n" + line_of(n=2.5))
    out = tmp_path / "out.parquet"
    with pytest.raises(InvalidLine, match="line 2: not JSON"):
        run(scorer, sources, out)
    rejects = tmp_path / "bad.jsonl"
    assert run(scorer, sources, out, options=RowOptions("skip", window=8), rejects=rejects, resume=True).pairs == 2
