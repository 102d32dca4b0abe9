"""A plan counts the rows of a file, or estimates them from rows spread over it, and multiplies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cappy_engine.bulk import estimate as planning
from cappy_engine.bulk.estimate import Sample, estimate, sample_file
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.cli.main import main
from cappy_engine.cli.text import describe_estimate, duration
from cappy_engine.errors import CappyError
from cappy_engine.testing import fake_scorer
from tests.support.bulk_files import write_rows

FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".parquet"]


def growing(count: int) -> list[tuple[str, str]]:
    """Make pairs whose lengths grow, so that the first ones are not like all."""
    return [("Is it?", "word " * (1 + 20 * row // count)) for row in range(count)]


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Write pairs in the format of the name."""
    write_rows(path, [{"instruction": instruction, "response": response} for instruction, response in pairs])


@pytest.fixture
def _small_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read little of a file, so that one of some kilobytes is large."""
    for name, size in (("SAMPLE_BYTES", 20_000), ("PLACES", 16), ("PLACE_BYTES", 800)):
        monkeypatch.setattr(planning, name, size)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_small_file_of_any_format_is_counted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, growing(50))
    sample = sample_file(path)
    assert (sample.rows, sample.is_exact, sample.is_spread, sample.refused) == (50, True, True, 0)
    assert list(sample.pairs) == growing(50)
    assert sample.input_bytes == path.stat().st_size < sample.output_bytes
    words = [len(response) // 5 for _, response in sample_file(path, rows=10).pairs]
    assert words == sorted(words)
    assert (len(words), words[0]) == (10, 1)
    assert words[-1] >= 18


@pytest.mark.usefixtures("_small_places")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_a_large_file_are_spread_over_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, growing(3000))
    sample = sample_file(path, rows=160)
    assert sample.rows == pytest.approx(3000, rel=0.1)
    assert sample.is_exact == (suffix == ".parquet")
    assert sample.is_spread
    words = [len(response) / 5 for _, response in sample.pairs]
    assert np.mean(words) == pytest.approx(10.5, rel=0.15)
    assert max(words) - min(words) > 15


@pytest.mark.usefixtures("_small_places")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz"])
def test_a_large_file_that_is_read_from_its_beginning_says_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, [(f"Is it {row:05}?", f"{row**3 % 99999:05}") for row in range(20_000)])
    sample = sample_file(path)
    assert (sample.is_exact, sample.is_spread) == (False, False)
    if suffix == ".csv":  # the packed one is read some kilobytes ahead
        assert sample.rows == pytest.approx(20_000, rel=0.15)
    found = estimate(fake_scorer(), sample, seconds=0.01)
    assert found.spread is None
    assert "its beginning, which alone was read" in describe_estimate(found)


def test_bad_rows_are_told_and_not_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "a", "response": "b"}\n\noops\n{"instruction": "a"}\n')
    sample = sample_file(tmp_path / "a.jsonl")
    assert (sample.rows, sample.refused) == (1, 2)
    assert "bad rows  2 of the sample; the first: not JSON" in describe_estimate(
        estimate(fake_scorer(), sample, seconds=0.01)
    )


def test_the_estimate_is_rows_times_what_a_pair_takes() -> None:
    pairs, places = [("a", "b"), ("a", "b c d")], np.array([0, 1])
    sample = Sample(pairs, places, 1000, False, True, 0, "", 10.0, 100, 200)
    found = estimate(fake_scorer(), sample, seconds=0.01)
    assert found.seconds == pytest.approx(1000 / found.pairs_per_second)
    assert found.tokens.tolist() == fake_scorer().encode(pairs).lengths.tolist()
    assert 0 < found.tokenize_share < 1
    assert found.spread
    text = describe_estimate(found)
    assert "about 1,000; 2 of them were measured" in text
    assert "give or take" in text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "a.jsonl holds no row that can be scored"),
        ("a.jsonl", b"\n", "a.jsonl holds no row that can be scored"),
        ("a.jsonl", b'{"instruction": "a"}\n', "holds no row that can be scored: has no field 'response'"),
        ("a.csv", b"instruction,answer\na,b\n", "a.csv has no column 'response'; found 'instruction', 'answer'"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is not a complete gzip file"),
        ("a.parquet", b"no Parquet", "a.parquet is not a complete Parquet file"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CappyError, match=problem):
        sample_file(tmp_path / name)


def test_columns_of_other_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tanswer\nIs it?\tYes\n")
    task = ScoreTask(instruction_column="question", response_column="answer")
    assert list(sample_file(tmp_path / "a.tsv", task).pairs) == [("Is it?", "Yes")]


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", growing(20))
    assert main(["plan", str(tmp_path / "a.jsonl"), "--seconds", "0.05", "--threads", "1"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words == ["rows", "tokens", "speed", "time", "memory", "disk"]
    assert main(["plan", str(tmp_path / "none.jsonl")]) == 1


def test_times_are_told_in_two_units() -> None:
    assert [duration(each) for each in (0.25, 59.94, 61, 3600, 93784, 10**8)] == [
        "0.2 s", "59.9 s", "1 min 1 s", "1 h 0 min", "1 d 2 h", "1157 d 9 h",
    ]  # fmt: skip
