"""A name of a file that tells another format is an error; in a folder, a note tells of such files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.cli.main import main
from tests.support.bulk_files import pairs_of, write_rows

PACKED = "files packed as {} are neither read nor written; choose .gz or .zst, or a name without packing"
OTHER = "{} files are neither read nor written; choose .jsonl, .csv, .tsv or .parquet"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", pairs_of(3))


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x.csv.bz2", PACKED.format(".bz2")),
        ("x.jsonl.xz", PACKED.format(".xz")),
        ("x.zip", PACKED.format(".zip")),
        ("x.jsonl.LZ4", PACKED.format(".lz4")),
        ("x.jsonl.zstd", PACKED.format(".zstd")),
        ("x.xlsx", OTHER.format(".xlsx")),
        ("x.arrow.gz", OTHER.format(".arrow")),
    ],
)
@pytest.mark.parametrize("place", ["input", "output", "rejects", "rejects of a stream"])
def test_names_of_packings_and_formats_that_we_lack_are_refused(
    name: str, problem: str, place: str, source: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, folder = source.with_name(name), source.parent
    if place == "input":
        source.rename(named)
    arguments = {
        "input": [named, "-o", folder / "out.jsonl"],
        "output": [source, "-o", named],
        "rejects": [source, "-o", folder / "out.jsonl", "--rejects", named],
        "rejects of a stream": [source, "--rejects", named],
    }[place]
    assert main(["score", *map(str, arguments), "--bundle", str(bundle)]) == 1
    assert capsys.readouterr() == ("", f"cappy score: {named}: {problem}\n")
    assert names_in(folder) == [named.name if place == "input" else source.name]


def test_files_of_a_folder_that_are_not_read_are_told_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "deep/b.jsonl"):
        write_rows(folder / name, pairs_of(3))
    for name in ("part-00000", "deep/b.jsonl.bz2", "a.jsonl.settings.json"):
        (folder / name).write_text("{}")
    arguments = [str(folder), "--bundle", str(bundle), "--quiet"]
    assert main(["score", *arguments, "-o", str(tmp_path / "out")]) == 0
    note = f"note: files whose names do not tell rows are not read: {folder}/deep/b.jsonl.bz2 and 1 more\n"
    assert note in capsys.readouterr().err
    assert names_in(tmp_path / "out") == ["a.jsonl", "deep/b.jsonl"]
    for name in ("a.jsonl", "deep/b.jsonl", "a.jsonl.settings.json"):
        (folder / name).unlink()
    assert main(["score", *arguments, "-o", str(tmp_path / "other")]) == 1
    problem = "holds no file of rows (.jsonl, .csv, .parquet, packed or not) but others, which are not read: "
    assert f"{problem}{folder}/deep/b.jsonl.bz2 and 1 more" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-o", "--rejects"])
@pytest.mark.parametrize("is_there", [False, True])
def test_one_input_is_not_written_to_a_folder_and_no_advice_says_so(
    is_there: bool, option: str, source: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = source.with_name("new")
    if is_there:
        folder.mkdir()
    outputs = {"-o": f"{source.parent}/out.jsonl", option: f"{folder}/"}
    words = [word for pair in outputs.items() for word in pair]
    assert main(["score", str(source), *words, "--bundle", str(bundle)]) == 1
    example = folder / ("scored.jsonl" if option == "-o" else "bad.jsonl")
    problem = f"{folder}/ is a folder's name, and all is written to one file; name that, as in {option} {example}"
    assert capsys.readouterr() == ("", f"cappy score: {problem}\n")
    assert names_in(source.parent) == [source.name]


@pytest.mark.parametrize(
    "words",
    [
        "in.jsonl -o new/out.jsonl",
        "in.jsonl -o out.jsonl --rejects new/bad.jsonl",
        "in.jsonl --rejects new/bad.jsonl",
        "/dev/null -o new/out.jsonl",
        "/dev/null -o out.jsonl --rejects new/bad.jsonl",
    ],
)
def test_a_folder_of_an_output_or_of_rejects_is_not_made(
    words: str, source: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    assert main(["score", *words.split(), "--bundle", str(bundle)]) == 1
    named = next(word for word in words.split() if word.startswith("new/"))
    problem = f"{named} cannot be written: the folder new does not exist; make it first"
    assert capsys.readouterr() == ("", f"cappy score: {problem}\n")
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


def test_dev_null_may_get_both_results_and_bad_rows(
    source: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source.write_bytes(source.read_bytes() + b"oops\n")
    options = ["--bundle", str(bundle), "-o", "/dev/null", "--rejects", "/dev/null"]
    assert main(["score", str(source), *options]) == 3
    assert "3 pairs scored" in capsys.readouterr().err


def test_empty_files_of_csv_in_a_folder_hold_no_rows(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.csv", "b.tsv", "c.jsonl"):
        (folder / name).touch()
    write_rows(folder / "d.csv", pairs_of(3))
    arguments = ["score", str(folder), "-o", str(out), "--bundle", str(bundle)]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert f"note: empty files of CSV hold no rows, and are left out: {folder}/a.csv and 1 more\n" in told
    assert "3 pairs scored" in told
    assert names_in(out) == ["c.jsonl", "d.csv"]
    assert main([*arguments, "--resume"]) == 1
    assert f"{out} is complete already" in capsys.readouterr().err
    for name in ("c.jsonl", "d.csv"):
        (folder / name).unlink()
    assert main(arguments) == 1
    assert f"but empty ones, which are not read: {folder}/a.csv and 1 more" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.parquet", "a.csv.gz"])
def test_an_empty_file_that_is_damaged_is_an_error_in_a_folder(
    name: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).touch()
    assert main(["score", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--bundle", str(bundle)]) == 1
    assert f"{name} is not a complete" in capsys.readouterr().err
