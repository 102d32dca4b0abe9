"""What has its name is on the disk: its bytes were written there before, and its folder after."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from cappy_engine import storage
from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.publish import Kind, publish, staging_folder
from cappy_engine.testing import fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bulk_files import pairs_of, run, write_rows

KIND = Kind("a thing", "thing.json")
Event = tuple[str, str]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Record what is "synced" and "named", by the names that files have in the end."""
    found: list[Event] = []
    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        found.append(("synced", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def noted(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def rename_it(path: Path, target: Path) -> None:
            rename(path, target)
            kept = [(kind, f"{name}/") for kind, name in found if name != str(target)]
            found[:] = [(kind, re.sub(f"^{re.escape(str(path))}/", f"{target}/", name)[:-1]) for kind, name in kept]
            found.append(("named", str(target)))

        return rename_it

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted(os.rename))
    monkeypatch.setattr(os, "replace", noted(os.replace))
    return found


def check_lasts(events: list[Event], out: Path) -> None:
    """Check that `out`, and all that is in it, was on the disk when it got its name, and that its name is, too."""
    named = events.index(("named", str(out)))
    for path in (out, *out.rglob("*")):
        assert ("synced", str(path)) in events[:named], path
    assert ("synced", str(out.parent)) in events[named:]


def test_a_file_of_our_own_lasts(tmp_path: Path, events: list[Event]) -> None:
    storage.write_json(tmp_path / "answer.json", {})
    check_lasts(events, tmp_path / "answer.json")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_lasts_with_all_that_is_in_it(force: bool, tmp_path: Path, events: list[Event]) -> None:
    out = tmp_path / "out"
    if force:
        out.mkdir()
        (out / KIND.marker).write_text("old")
    with staging_folder(out, print) as staging:
        (staging / KIND.marker).write_text("new")
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("new")
        publish(staging, out, KIND, force=force)
    check_lasts(events, out)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_scores_last(name: str, tmp_path: Path, tokenizer: PairTokenizer, events: list[Event]) -> None:
    out = tmp_path / name
    run(fake_scorer(tokenizer=tokenizer), write_rows(tmp_path / f"in{out.suffix}", pairs_of(20)), out)
    check_lasts(events, out)


@pytest.mark.parametrize("others", [[], ["out"], ["out", "the same file"]])
def test_what_a_command_writes_lasts(others: list[str], tmp_path: Path, events: list[Event]) -> None:
    """A file that has several names is written over."""
    out = tmp_path / "out"
    for name in others:
        (tmp_path / name).hardlink_to(out) if out.exists() else out.write_text("old")
    with open_output(out, force=True) as file:
        file.write(b"new")
    if len(others) < 2:
        check_lasts(events, out)
    else:
        assert ("synced", str(out)) in events


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_whose_folders_cannot_be_synced_can_be_written_to(
    number: int, tmp_path: Path, tokenizer: PairTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, fsync = write_rows(tmp_path / "in.jsonl", pairs_of(20)), tmp_path / "out.jsonl", os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    run(fake_scorer(tokenizer=tokenizer), source, out)
    assert len(out.read_text().splitlines()) == 20


@pytest.mark.parametrize(("number", "name"), [(errno.EIO, "."), (errno.EINVAL, "file")])
def test_other_errors_of_the_disk_are_errors(
    number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match=os.strerror(number)):
        storage.sync(tmp_path / name)


def test_ctrl_c_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        file.write(b"{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), storage.whole_file(tmp_path / "answer.json") as file:
        interrupted(file)
    assert list(tmp_path.iterdir()) == []
