"""JSON Lines and CSV in and out, packed or not: other columns stay as they are."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.formats.file_format import Format, format_of
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.tasks import RankTask, ScoreTask
from cappy_engine.errors import CappyError, InvalidLine
from tests.support.bulk_files import WINDOW, pairs_of, run, scores_of, write_rows
from tests.support.scored_lines import GOOD, LONG


@pytest.mark.parametrize("form", ["csv", "tsv", "csv.gz"])
def test_files_whose_columns_are_not_the_same_ones_are_not_scored_together(
    form: str, tmp_path: Path, scorer: Scorer
) -> None:
    """Rows keep their bytes below the header of the first file: those of the second would change their columns."""
    header, row = "instruction,response,id", "Is it?,Yes,1"
    for name, text in (("a", f"{header}\n{row}\n"), ("b", "response,instruction,id\nYes,Is it?,2\n")):
        content = text.replace(",", "\t" if form == "tsv" else ",").encode()
        (tmp_path / f"{name}.{form}").write_bytes(gzip.compress(content) if form.endswith("gz") else content)
    sources = [tmp_path / f"{name}.{form}" for name in "ab"]
    with pytest.raises(CappyError, match=rf"b\.{form} has other columns than .*a\.{form}; columns must be equal"):
        run(scorer, sources, tmp_path / f"out.{form}")
    assert not (tmp_path / f"out.{form}").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", Format()),
        ("a.JSONL.GZ", Format("jsonl", "gz")),
        ("a", Format()),
        ("pairs.txt", Format()),
        ("a.csv.zst", Format("csv", "zst", ",")),
        ("a.tsv", Format("csv", "", "\t")),
        ("b.parquet", Format("parquet")),
    ],
)
def test_a_name_tells_the_format(name: str, expected: Format) -> None:
    assert format_of(name) == expected


# CSV


def test_csv_keeps_its_bytes_and_gets_two_columns(tmp_path: Path, scorer: Scorer) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(
        b'\xef\xbb\xbf"instruction",response,id\r\n"Is it, or\nis it ""not""?",yes, 1 \r\n\r\nIs it?,,02\r\n'
    )
    totals = run(scorer, source, tmp_path / "out.csv")
    first, second = scorer.score([('Is it, or\nis it "not"?', "yes"), ("Is it?", "")]).tolist()
    assert (tmp_path / "out.csv").read_bytes() == (
        b'\xef\xbb\xbf"instruction",response,id,score,score_truncated\r\n'
        b'"Is it, or\nis it ""not""?",yes, 1 ,%a,false\r\n'
        b"Is it?,,02,%a,false\r\n" % (first, second)
    )
    assert (totals.pairs, totals.blank_lines) == (2, 1)


def test_tabs_stand_between_the_values_of_a_tsv(tmp_path: Path, scorer: Scorer) -> None:
    (tmp_path / "in.tsv").write_text("instruction\tresponse\nIs it, really?\tYes\n")
    run(scorer, tmp_path / "in.tsv", tmp_path / "out.tsv")
    header, row = (tmp_path / "out.tsv").read_text().splitlines()
    assert header.split("\t") == ["instruction", "response", "score", "score_truncated"]
    assert row.split("\t")[3] == "false"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "in.csv has no first line with the names of its columns"),
        (b"instruction,answer\nq,a\n", "in.csv has no column 'response'; found 'instruction', 'answer'"),
        (b"instruction,response,response\nq,a,b\n", "in.csv has the column 'response' 2 times"),
        (b"instruction,response,score\nq,a,1\n", "in.csv has a column 'score' already; choose another"),
        (b"instruction,response\nq,a\nq\n", "line 3: has 1 values, and the first line names 2 columns"),
        (b"instruction,response\nq,a,b\n", "line 2: has 3 values"),
        (
            b'instruction,response\nq,"a\n\n',
            r"line 2: not CSV \(.* of data\); is a quote not closed\? \(lines 2 to 3\)$",
        ),
        (b'instruction,response\nq,"a\n', r"line 2: not CSV \(unexpected end of data\); is a quote not closed\?$"),
        (
            b"instruction,response\rq,a\r",
            r"in.csv, line 1: not CSV \(a carriage return .*\); lines end with .n or .r.n$",
        ),
        (b'instruction,response\nq,"a"b\n', r"line 2: not CSV \(',' expected after '\"'\)"),
        (b"instruction,response\nq,a\nq,\xe9\n", r"line 3: not UTF-8 \(byte 2: 0xe9\)"),
        (b"\xff\xfei\0n\0", "the input is UTF-16 or UTF-32; make it UTF-8"),
        (b'instruction,response\nq,"' + b"x" * 60 + b"\n" + b"x" * 60, "line 2: is longer than 100 bytes .*not closed"),
    ],
)
def test_bad_csv_is_an_error_with_its_place(content: bytes, problem: str, tmp_path: Path, scorer: Scorer) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(content)
    with pytest.raises(CappyError, match=problem):
        run(scorer, source, tmp_path / "out.csv", options=RowOptions(max_line_bytes=100))
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("record", [b"q," + b"x" * 98, b'q,"' + b"x" * 50 + b"\n" + b"x" * 45 + b'"'])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_record_may_be_as_long_as_a_line(record: bytes, end: bytes, tmp_path: Path, scorer: Scorer) -> None:
    options = RowOptions(max_line_bytes=100)
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(b"instruction,response\n" + record + end)
    assert run(scorer, source, out, options=options).pairs == 1
    source.write_bytes(b"instruction,response\n" + b"q" + record + end)
    with pytest.raises(InvalidLine, match=r"^line 2: is longer than 100 bytes"):
        run(scorer, source, out, options=options, force=True)


def test_bad_records_go_to_the_rejects_and_the_next_one_is_read(tmp_path: Path, scorer: Scorer) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b"instruction,response\nq,a\nq\n\xe9,a\nq,b\n")
    skip = RowOptions("skip", window=WINDOW)
    run(scorer, source, tmp_path / "out.csv", options=skip, rejects=tmp_path / "bad.jsonl")
    assert [line.split(",")[1] for line in (tmp_path / "out.csv").read_text().splitlines()] == ["response", "a", "b"]
    rejects = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(each["line"], each["text"]) for each in rejects] == [(3, "q"), (4, r"\xe9,a")]


def test_csv_and_tsv_are_two_formats(tmp_path: Path, scorer: Scorer) -> None:
    sources = [write_rows(tmp_path / "a.csv", pairs_of(2)), tmp_path / "b.tsv"]
    sources[1].write_text("id\tinstruction\tresponse\n3\tq\ta\n")
    for out in ("out.csv", "out.jsonl"):
        with pytest.raises(CappyError, match="the inputs have several formats, CSV and TSV; give those of one format"):
            run(scorer, sources, tmp_path / out)
    with pytest.raises(CappyError, match="rows of TSV are not written as CSV; choose"):
        run(scorer, sources[1], tmp_path / "out.csv")


# What comes twice


@pytest.mark.parametrize("into", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_columns_of_one_name_are_an_error_where_one_would_be_lost(
    form: str, into: str, tmp_path: Path, scorer: Scorer
) -> None:
    source = tmp_path / f"in.{form}"
    names = ["instruction", "response", "x", "x"]
    if form == "csv":
        source.write_text(",".join(names) + "\nq,a,1,2\n")
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table([["q"], ["a"], ["1"], ["2"]], names), source)
    run(scorer, source, tmp_path / f"same.{form}")
    if form != into:
        if into == "parquet":
            pytest.importorskip("pyarrow")
        with pytest.raises(CappyError, match=rf"in\.{form} has the column 'x' 2 times; found 'instruction', 'resp"):
            run(scorer, source, tmp_path / f"out.{into}")


def test_fields_of_one_name_are_an_error_where_one_would_be_lost(tmp_path: Path, scorer: Scorer) -> None:
    pytest.importorskip("pyarrow")
    source = tmp_path / "in.jsonl"
    for field in (b'"m": 1, "\\u006d": 2', b'"m": {"n": 1}, "k": [{"m": 1, "m": 2}]'):
        source.write_bytes(GOOD + b'{"instruction": "q", "response": "a", ' + field + b"}\n")
        run(scorer, source, tmp_path / "same.jsonl", force=True)
        assert field in (tmp_path / "same.jsonl").read_bytes()
        with pytest.raises(InvalidLine, match=r"^line 2: has the field 'm' twice; give it once"):
            run(scorer, source, tmp_path / "out.parquet", force=True)


# Packed


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_files_are_read_and_written(packing: str, tmp_path: Path, scorer: Scorer) -> None:
    if packing == "zst":
        pytest.importorskip("pyarrow")
    rows = pairs_of(30)
    source = write_rows(tmp_path / f"in.jsonl.{packing}", rows)
    out, again = tmp_path / f"out.jsonl.{packing}", tmp_path / "again.jsonl"
    run(scorer, source, out)
    run(scorer, out, again, task=ScoreTask(score_field="again"))
    found = [json.loads(line) for line in again.read_text().splitlines()]
    expected = scores_of(scorer, rows)
    assert found == [{**row, "score": score, "again": score} for row, score in zip(rows, expected, strict=True)]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_packed_file_without_rows_is_a_packed_file(packing: str, tmp_path: Path, scorer: Scorer) -> None:
    if packing == "zst":
        pytest.importorskip("pyarrow")
    source, out, again = tmp_path / "in.jsonl", tmp_path / f"out.jsonl.{packing}", tmp_path / "again.jsonl"
    source.write_bytes(b"bad\n")
    run(scorer, source, out, options=RowOptions("skip"))
    assert run(scorer, out, again, task=ScoreTask(score_field="again")).pairs == 0
    assert again.read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("cut", [-5, -40, 0])
def test_a_packed_file_that_is_cut_is_an_error_with_its_place(
    packing: str, cut: int, tmp_path: Path, scorer: Scorer
) -> None:
    if packing == "zst":
        pytest.importorskip("pyarrow")
    source = write_rows(tmp_path / f"in.jsonl.{packing}", pairs_of(300))
    source.write_bytes(source.read_bytes()[:cut])
    with pytest.raises(CappyError, match=rf"in\.jsonl\.{packing} is not a complete (gzip|zstd) file: "):
        run(scorer, source, tmp_path / "out.jsonl")


# Names of columns, ranking


def test_columns_may_have_other_names(tmp_path: Path, scorer: Scorer) -> None:
    rows = [{"prompt": "q", "answer": "a"}]
    task = ScoreTask("prompt", "answer", "reward")
    run(scorer, write_rows(tmp_path / "in.csv", rows), tmp_path / "out.csv", task=task)
    with (tmp_path / "out.csv").open() as file:
        assert list(next(csv.DictReader(file))) == ["prompt", "answer", "reward", "reward_truncated"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rank_tells_the_winner_all_scores_and_the_margin(form: str, tmp_path: Path, scorer: Scorer) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    rows: list[dict[str, Any]] = [
        {"instruction": "Is the sky blue?", "candidates": ["Yes", "No", "Maybe"]},
        {"instruction": "q", "candidates": ["a", LONG]},
        {"instruction": "q", "candidates": ["a"]},
        {"instruction": "q", "candidates": ["a", "a"]},
    ]
    run(scorer, write_rows(tmp_path / f"in.{form}", rows), tmp_path / f"out.{form}", task=RankTask())
    if form == "parquet":
        import pyarrow.parquet as pq

        found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    else:
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, made in zip(rows, found, strict=True):
        ranked = scorer.rank(str(row["instruction"]), row["candidates"])
        assert made["winner"] == ranked[0].response
        assert made["winner_index"] == ranked[0].index
        assert made["scores"] == [each.score for each in sorted(ranked, key=lambda each: each.index)]
        expected = ranked[0].score - ranked[1].score if len(ranked) > 1 else None
        assert made["margin"] == (None if expected is None else pytest.approx(expected, abs=1e-6))
    assert [made.get("truncated") or None for made in found] == [None, [1], None, None]


@pytest.mark.parametrize(
    ("candidates", "problem"),
    [
        ([], "candidates is empty; there is nothing to rank"),
        ("Yes", "candidates must be a list of texts, got str 'Yes'"),
        (["Yes", None], "a candidate must be a str, got NoneType None"),
        (None, "candidates must be a list of texts, got NoneType None"),
    ],
)
def test_a_row_without_candidates_is_an_error_with_its_line(
    candidates: object, problem: str, tmp_path: Path, scorer: Scorer
) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "q", "candidates": ["a"]},
        {"instruction": "q", "candidates": candidates},
    ]
    with pytest.raises(InvalidLine, match=f"^line 2: {problem}"):
        run(scorer, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", task=RankTask())
