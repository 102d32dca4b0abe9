"""A folder that a command makes: new, or in the place of one of its kind, and never of what is read."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from cappy_engine import storage
from cappy_engine.errors import OutputError
from cappy_engine.publish import Kind, check_folder, check_space, publish, staging_folder

KIND = Kind("a thing", "thing.json")


def made(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / KIND.marker).write_text(content)
    return folder


def replace(out: Path) -> Path:
    place = check_folder(out, KIND, force=True)
    with staging_folder(place, print) as staging:
        (staging / KIND.marker).write_text("new")
        publish(staging, place, KIND, force=True)
    return place


def test_a_new_folder_may_have_any_name(tmp_path: Path) -> None:
    inputs = [made(tmp_path / "input")]
    for out in (tmp_path / "new", tmp_path / "more" / "new", tmp_path / "input" / "new"):
        assert check_folder(out, KIND, force=False, inputs=inputs) == out


@pytest.mark.parametrize("name", ["file", "folder", "empty", "dangling"])
def test_force_replaces_no_other_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / KIND.marker).mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists; choose another name, or replace it with --force"):
        check_folder(tmp_path / name, KIND, force=False)
    with pytest.raises(OutputError, match=r"exists and is not a thing \(it has no thing\.json\)"):
        check_folder(tmp_path / name, KIND, force=True)


def test_what_is_read_is_not_replaced_by_any_name(tmp_path: Path) -> None:
    out, other = made(tmp_path / "out"), made(tmp_path / "other")
    (out / "rows.jsonl").write_text("")
    (tmp_path / "link").symlink_to(out)
    (other / "weights").symlink_to(out / "rows.jsonl")
    deep = made(out / "inner" / "deep")
    with pytest.raises(OutputError, match="is, holds or lies in the input"):
        check_folder(deep, KIND, force=True, inputs=[out])
    for each in (out, tmp_path / "link", out / "rows.jsonl", out / "inner", tmp_path, other):
        with pytest.raises(OutputError, match="is, holds or lies in the input"):
            check_folder(out, KIND, force=True, inputs=[each])
        with pytest.raises(OutputError, match="is, holds or lies in the input"):
            check_folder(tmp_path / "link", KIND, force=True, inputs=[each])
    assert check_folder(out, KIND, force=True, inputs=[made(tmp_path / "apart"), tmp_path / "nowhere"]) == out


def test_a_link_leads_to_the_new_folder(tmp_path: Path) -> None:
    out = made(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    assert replace(tmp_path / "current") == out
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "current" / KIND.marker).read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "v1"]


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made(tmp_path / "out"))
    assert replace(Path()) == tmp_path / "out"
    assert (tmp_path / "out" / KIND.marker).read_text() == "new"


@pytest.mark.parametrize("last", [1, 2])
def test_interrupted_while_it_is_replaced_the_old_or_the_new_folder_is_there(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, renamed, rename = made(tmp_path / "out"), list[Path](), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        found = rename(path, target)
        renamed.append(path)
        if len(renamed) == last:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(out)
    assert (out / KIND.marker).read_text() == {1: "old", 2: "new"}[last]
    assert list(tmp_path.iterdir()) == [out]


def test_the_old_folder_is_kept_where_another_one_took_its_name_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = made(tmp_path / "out"), Path.rename

    def overtaken(path: Path, target: Path) -> Path:
        found = rename(path, target)
        if path == out:
            made(out, "another")
        return found

    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(OSError, match=r"\.out\.old-.*/out' -> '.*/out'"):
        replace(out)
    contents = {path.read_text() for path in tmp_path.rglob(KIND.marker)}
    assert contents == {"old", "another"}


def test_the_old_folder_comes_back_where_the_new_one_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = made(tmp_path / "out"), Path.rename

    def gone(path: Path, target: Path) -> Path:
        if target == out and path.name.startswith(".out.partial-"):
            shutil.rmtree(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", gone)
    with pytest.raises(FileNotFoundError):
        replace(out)
    assert (out / KIND.marker).read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_cannot_be_moved_stays_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    out = made(tmp_path / "out")
    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        replace(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_mount_cannot_be_replaced_which_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(tmp_path / "out")
    monkeypatch.setattr(storage, "is_mounted", lambda path: path == out)
    with pytest.raises(OutputError, match="is mounted, and cannot be replaced; name a new folder in it"):
        check_folder(out, KIND, force=True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)], ids=oct)
def test_a_folder_has_the_rights_that_its_user_gives_to_new_ones(umask: int, mode: int, tmp_path: Path) -> None:
    out, before = tmp_path / "out", os.umask(umask)
    try:
        replace(out)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == mode


def test_what_a_killed_command_left_is_told_whatever_the_name(tmp_path: Path) -> None:
    left, others = tmp_path / ".v[1].partial-abc", [tmp_path / ".v1.partial-abc", tmp_path / ".v[12].partial-abc"]
    for folder in (left, *others):
        folder.mkdir()
    said = list[str]()
    with staging_folder(tmp_path / "v[1]", said.append):
        pass
    assert said == [f"note: {left} is of another command that writes v[1]; if none is running, remove it"]


@pytest.mark.parametrize(("total", "free", "is_refused"), [(100, 9, True), (100, 10, False), (0, 0, False)])
def test_space_is_lacking_only_where_the_file_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, is_refused: bool
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(total=total, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match="free some space") if is_refused else contextlib.nullcontext():
        check_space(tmp_path / "out", 10, "a thing")
