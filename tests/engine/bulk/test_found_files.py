"""Which files of a folder are read: all that hold rows, and what is left out is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cappy_engine.bulk.folders import files_of_folder
from cappy_engine.bulk.resume.run_list import RUN
from cappy_engine.errors import CappyError, OutputError
from tests.support.bulk_files import pairs_of, write_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, pairs_of(2))
    return folder


def names_in(folder: Path, said: list[str]) -> list[str]:
    return [str(name) for _, name in files_of_folder(folder, say=said.append)]


@pytest.mark.parametrize("hidden", [".x.jsonl", ".ipynb_checkpoints/a.jsonl", "deep/.x.csv.gz", "deep/.y/z/x.parquet"])
def test_hidden_files_of_rows_are_left_out_and_told(hidden: str, source: Path) -> None:
    (source / hidden).parent.mkdir(parents=True, exist_ok=True)
    (source / hidden).write_bytes(b"")
    said: list[str] = []
    assert names_in(source, said) == ["a.jsonl", "b.jsonl"]
    assert said == [f"note: hidden files of rows are not read: {source / hidden}; one that is given by its name is"]
    (source / ".a.jsonl").write_bytes(b"")
    assert names_in(source, said) == ["a.jsonl", "b.jsonl"]
    assert said[1:] == [
        f"note: hidden files of rows are not read: {source}/.a.jsonl and 1 more; one that is given by its name is"
    ]


def test_what_is_hidden_and_holds_no_rows_is_not_told(source: Path) -> None:
    (source / ".git" / "objects").mkdir(parents=True)
    for name in (".gitattributes", ".git/HEAD", ".git/objects/0a1b", ".a.jsonl.settings.json", ".empty/"):
        (source / name).mkdir() if name.endswith("/") else (source / name).write_text("{}")
    (source / ".nowhere").symlink_to("nowhere")
    said: list[str] = []
    assert names_in(source, said) == ["a.jsonl", "b.jsonl"]
    assert said == []


def test_a_folder_of_hidden_files_alone_is_an_error_that_names_them(tmp_path: Path) -> None:
    write_rows(tmp_path / ".x.jsonl", pairs_of(2))
    with pytest.raises(
        CappyError, match=r"holds no file of rows .* but hidden ones, which are not read: .*/\.x\.jsonl$"
    ):
        files_of_folder(tmp_path)


def test_a_hidden_folder_that_is_given_is_read(source: Path) -> None:
    said: list[str] = []
    assert names_in(source.rename(source.parent / ".in"), said) == ["a.jsonl", "b.jsonl"]
    assert said == []


def test_files_beside_outputs_are_not_taken_for_rows(source: Path) -> None:
    write_rows(source / "c.settings.json", pairs_of(2))
    for name in ("a.jsonl.settings.json", "b.jsonl.progress.json", "gone.csv.gz.settings.json", RUN):
        (source / name).write_text("{}")
    assert [str(name) for _, name in files_of_folder(source)] == ["a.jsonl", "b.jsonl", "c.settings.json"]


@pytest.mark.parametrize("name", ["in", "in/out", "in/deep/out", "link/out"])
def test_outputs_in_the_folder_that_is_read_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(OutputError, match=f"{name} is in the input folder .*/in; choose a folder beside it"):
        files_of_folder(source, [tmp_path / name])
    assert files_of_folder(source, [tmp_path / "in2"])


def test_linked_folders_and_files_are_read_under_the_names_of_their_links(source: Path, tmp_path: Path) -> None:
    (tmp_path / "ext" / "deep").mkdir(parents=True)
    write_rows(tmp_path / "ext" / "deep" / "c.jsonl", pairs_of(2))
    for name in ("one", "two"):
        (source / name).symlink_to("../ext")
    (source / "d.jsonl").symlink_to("../ext/deep/c.jsonl")
    names = [str(name) for _, name in files_of_folder(source)]
    assert names == ["a.jsonl", "b.jsonl", "d.jsonl", "one/deep/c.jsonl", "two/deep/c.jsonl"]


def test_an_output_in_a_linked_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "ext").mkdir()
    (source / "link").symlink_to("../ext")
    with pytest.raises(OutputError, match=r"ext/out is in the input folder .*/in/link; choose a folder beside it"):
        files_of_folder(source, [tmp_path / "ext" / "out"])


@pytest.mark.parametrize("target", [".", "..", "../in"])
def test_a_link_that_leads_back_is_an_error(target: str, source: Path) -> None:
    (source / "deep").mkdir()
    (source / "deep" / "link").symlink_to(target if target == "." else f"../{target}")
    with pytest.raises(CappyError, match=r"in/deep/\S*link leads back to a folder that it is in; remove the link"):
        files_of_folder(source)


@pytest.mark.parametrize("target", ["nowhere.jsonl", "c.jsonl"])
def test_a_link_that_leads_nowhere_is_an_error(target: str, source: Path) -> None:
    (source / "notes.txt").symlink_to("nowhere")
    assert len(files_of_folder(source)) == 2
    (source / "c.jsonl").symlink_to(target)
    with pytest.raises(CappyError, match=r"in/c\.jsonl cannot be read: .*; mend it, or move it away"):
        files_of_folder(source)


def test_what_is_no_file_and_has_the_name_of_one_is_an_error(source: Path) -> None:
    os.mkfifo(source / "c.jsonl")
    with pytest.raises(CappyError, match=r"in/c\.jsonl cannot be read: it is not a file; mend it, or move it away"):
        files_of_folder(source)


def test_a_folder_that_cannot_be_read_is_an_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "closed").mkdir()
    listed = Path.iterdir

    def refused(path: Path) -> Iterator[Path]:  # root, who runs this in containers, reads every folder
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CappyError, match=r"in/closed cannot be read: Permission denied; mend it, or move it away"):
        files_of_folder(source)
