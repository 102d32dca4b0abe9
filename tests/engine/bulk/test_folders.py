"""A folder of files: what is listed as complete is there, as it was written, and nothing else is lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.bulk.folders import RUN, Folder, files_of_folder, score_folder
from cappy_engine.bulk.row_options import RowOptions
from cappy_engine.bulk.runs import Target
from cappy_engine.bulk.tasks import ScoreTask
from cappy_engine.bulk.totals import Totals
from cappy_engine.errors import CappyError, OutputError
from tests.support.bulk_files import WINDOW, pairs_of, write_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, pairs_of(2 * WINDOW))
    return folder


def run_folder(
    scorer: Scorer, source: Path, out: Path, *, said: list[str] | None = None, window: int = WINDOW, **target: Any
) -> Totals:
    folder = Folder(files_of_folder(source), out, ScoreTask(), RowOptions(window=window))
    return score_folder(scorer, folder, Target(out, **target), say=print if said is None else said.append)


@pytest.fixture
def stopped_out(scorer: Scorer, source: Path) -> Path:
    """Give a folder in which a.jsonl is complete, and b.jsonl was not begun: its input was damaged, and was mended."""
    good, out = (source / "b.jsonl").read_bytes(), source.parent / "out"
    (source / "b.jsonl").write_bytes(b"oops\n")
    with pytest.raises(CappyError, match="not JSON"):
        run_folder(scorer, source, out)
    (source / "b.jsonl").write_bytes(good)
    return out


def test_a_file_that_was_complete_and_is_gone_is_written_again(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    written = (stopped_out / "a.jsonl").read_bytes()
    (stopped_out / "a.jsonl").unlink()
    said: list[str] = []
    totals = run_folder(scorer, source, stopped_out, said=said, resume=True)
    assert said == [f"{stopped_out}/a.jsonl was complete, and is gone; it is written again"]
    assert (totals.pairs, totals.pairs_before) == (4 * WINDOW, 0)
    assert (stopped_out / "a.jsonl").read_bytes() == written
    assert sorted(path.name for path in stopped_out.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_file_that_was_complete_and_is_not_as_it_was_is_an_error(
    scorer: Scorer, source: Path, stopped_out: Path
) -> None:
    written = (stopped_out / "a.jsonl").read_bytes()
    (stopped_out / "a.jsonl").write_bytes(written[:-9])
    with pytest.raises(OutputError, match=r"a\.jsonl has \d+ bytes, and \d+ were written; remove it, and go on"):
        run_folder(scorer, source, stopped_out, resume=True)
    assert (stopped_out / "a.jsonl").read_bytes() == written[:-9]


def test_settings_of_a_complete_file_are_those_of_any_run(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    with pytest.raises(OutputError, match=r"from another input \(window was 8, is 9\); start anew"):
        run_folder(scorer, source, stopped_out, resume=True, window=9)
    with (source / "a.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(OutputError, match=r"from another input \(input\.a\.jsonl was .*\); start anew"):
        run_folder(scorer, source, stopped_out, resume=True)


@pytest.mark.parametrize("content", [b"mine", b'{"mine": 1}', b'{"done": {"a": {}}}', b'{"done": [1]}'], ids=repr)
@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_a_file_of_the_user_with_the_name_of_the_list_is_not_lost(
    options: dict[str, Any], content: bytes, scorer: Scorer, source: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "out" / RUN
    mine.parent.mkdir()
    mine.write_bytes(content)
    with pytest.raises(OutputError, match=r"cappy\.run\.json cannot be read \(.*\); move or remove it, and start anew"):
        run_folder(scorer, source, tmp_path / "out", **options)
    assert mine.read_bytes() == content


def test_the_list_is_there_until_all_are_complete(scorer: Scorer, source: Path, stopped_out: Path) -> None:
    assert list(json.loads((stopped_out / RUN).read_text())["done"]) == ["a.jsonl"]
    assert run_folder(scorer, source, stopped_out, resume=True).pairs_before == 2 * WINDOW
    assert not (stopped_out / RUN).exists()


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
