"""Several inputs into one file: that their columns are the same is checked before anything is scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cappy_engine.cli.main import main
from tests.support.bulk_files import pairs_of

ROWS = pairs_of(5)


def write_table(path: Path, *, without: str = "", extra: Any = None) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0] if name != without}
    table = pa.table(columns)
    pq.write_table(table if extra is None else table.append_column("n", pa.array(range(5), extra)), path)


def write_csv(path: Path, header: str) -> None:
    path.write_text(f"{header}\nIs it?,Yes\n")


@pytest.mark.parametrize(
    ("name", "write_first", "write_last", "problem"),
    [
        (
            "{}.parquet",
            lambda path: write_table(path, extra=pa.int32()),
            lambda path: write_table(path, extra=pa.int64()),
            "{last} has other columns than {first}; columns must be equal: make them so, or score it into another file",
        ),
        ("{}.parquet", write_table, lambda path: write_table(path, without="response"), "{last} has no column"),
        (
            "{}.csv",
            lambda path: write_csv(path, "instruction,response"),
            lambda path: write_csv(path, "response,instruction"),
            "{last} has other columns than {first}; columns must be equal",
        ),
        ("{}.csv", lambda path: write_csv(path, "instruction,response"), Path.touch, "{last} has no first line"),
        (
            "{}.parquet",
            write_table,
            lambda path: path.write_bytes(b"PAR1"),
            "{last} is not a complete Parquet file",
        ),
    ],
    ids=["types", "no response", "order", "empty", "damaged"],
)
@pytest.mark.parametrize("output", ["out.jsonl", "/dev/null"])
def test_other_columns_of_the_last_input_are_refused_before_a_row_is_scored(
    name: str, write_first: Callable[[Path], None], write_last: Callable[[Path], None], problem: str, output: str,
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first, middle, last = (tmp_path / name.format(place) for place in ("first", "middle", "last"))
    write_first(first)
    write_first(middle)
    write_last(last)
    inputs, out = [str(first), str(middle), str(last)], str(tmp_path / output)
    assert main(["score", *inputs, "-o", out, "--bundle", str(bundle)]) == 1
    told = capsys.readouterr()
    assert problem.format(first=first, last=last) in told.err
    assert "--resume" not in told.err
    assert told.out == ""
    assert sorted(tmp_path.iterdir()) == sorted([first, middle, last])


def test_equal_columns_are_scored_into_one_file(bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / f"{name}.parquet", extra=pa.int32())
    inputs = [str(tmp_path / f"{name}.parquet") for name in ("a", "b")]
    assert main(["score", *inputs, "-o", str(tmp_path / "out.parquet"), "--bundle", str(bundle)]) == 0
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 10
