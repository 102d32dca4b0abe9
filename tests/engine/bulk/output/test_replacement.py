"""What the user had stays as it was: a file's mode, owner, attributes and links, and mounts."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import storage
from cappy_engine.bulk.output import replacement
from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.errors import OutputError
from tests.support.written import NEW, OLD, names, stop, write


def test_a_file_is_replaced_with_force_only(out: Path) -> None:
    out.write_bytes(OLD)
    with pytest.raises(OutputError, match=r"out\.jsonl exists; choose another name, or replace it with --force"):
        write(out)
    assert (out.read_bytes(), names(out.parent)) == (OLD, ["out.jsonl"])
    assert write(out, force=True) == []
    assert (out.read_bytes(), names(out.parent)) == (NEW, ["out.jsonl"])


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444, 0o755])
def test_a_replaced_file_keeps_its_mode_and_nobody_else_reads_it_meanwhile(mode: int, out: Path, partial: Path) -> None:
    out.write_bytes(OLD)
    out.chmod(mode)
    with open_output(out, force=True) as output:
        output.write(NEW)
        assert stat.S_IMODE(partial.stat().st_mode) == mode
    assert (stat.S_IMODE(out.stat().st_mode), out.read_bytes()) == (mode, NEW)


def test_a_new_file_has_the_mode_of_any_other(out: Path) -> None:
    write(out)
    out.with_name("plain").touch()
    assert out.stat().st_mode == out.with_name("plain").stat().st_mode


def test_a_replaced_file_keeps_its_owner_and_attributes(out: Path) -> None:
    out.write_bytes(OLD)
    if os.geteuid() == 0:
        os.chown(out, 12345, 54321)
    try:
        os.setxattr(out, "user.mine", b"kept")
    except OSError:
        pytest.skip("this file system has no attributes")
    before = out.stat()
    write(out, force=True)
    assert (out.stat().st_uid, out.stat().st_gid) == (before.st_uid, before.st_gid)
    assert os.getxattr(out, "user.mine") == b"kept"


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_stays_and_its_target_is_written(is_there: bool, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if is_there:
        target.write_bytes(OLD)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "link2").symlink_to("link")
    write(tmp_path / "link2", force=is_there)
    assert (tmp_path / "link").is_symlink()
    assert (target.read_bytes(), names(target.parent)) == (NEW, ["target"])


def test_hard_links_stay_one_file(out: Path) -> None:
    out.write_bytes(OLD)
    out.with_name("other").hardlink_to(out)
    write(out, force=True)
    assert out.samefile(out.with_name("other"))
    assert (out.read_bytes(), names(out.parent)) == (NEW, ["other", "out.jsonl"])


def test_another_file_that_took_the_place_of_a_linked_one_is_not_written_over(out: Path, partial: Path) -> None:
    def take() -> None:
        out.unlink()
        out.write_bytes(b"mine")

    out.write_bytes(OLD)
    out.with_name("other").hardlink_to(out)
    with pytest.raises(OutputError, match=r"out\.jsonl was replaced meanwhile; move it away, and rename .*partial"):
        write(out, meanwhile=take, force=True)
    assert (out.read_bytes(), partial.read_bytes(), out.with_name("other").read_bytes()) == (b"mine", NEW, OLD)


@pytest.mark.slow
def test_a_file_that_is_a_mount_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(OLD)
    (tmp_path / "out").touch()
    code = "from pathlib import Path; from tests.support.written import write; write(Path('out'), force=True)"
    command = 'mount --bind real out && "$0" -c "$1"'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", command, sys.executable, code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("may not mount here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "real").read_bytes() == NEW
    assert names(tmp_path) == ["out", "real"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY])
def test_where_nothing_can_be_renamed_is_found_out_at_the_start(
    number: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    with pytest.raises(OutputError, match=r"files cannot be renamed in .*; choose another folder"):
        write(out)
    assert names(out.parent) == []
    out.write_bytes(OLD)
    write(out, force=True)  # over the old content, which needs no renaming
    assert (out.read_bytes(), names(out.parent)) == (NEW, ["out.jsonl"])


def test_a_file_that_can_neither_be_replaced_nor_written_is_refused_at_the_start(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_bytes(OLD)
    opened = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if Path(path) == out and flags & os.O_WRONLY:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        OutputError, match=r"out\.jsonl can neither be replaced nor written \(Operation not permitted\)"
    ):
        write(out, force=True)
    assert (out.read_bytes(), names(out.parent)) == (OLD, ["out.jsonl"])


def test_a_full_disk_leaves_what_is_written_over_as_it_was(
    out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_bytes(OLD)
    out.with_name("other").hardlink_to(out)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{out}'"):
        write(out, force=True)
    assert (out.read_bytes(), partial.read_bytes()) == (OLD, NEW)


def test_a_file_system_without_locks_or_attributes_is_written_to(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Iterator[Any]:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(storage, "lock", fail)
    monkeypatch.setattr(os, "listxattr", fail)
    out.write_bytes(OLD)
    write(out, force=True)
    assert out.read_bytes() == NEW
    stop(out, force=True)
    with pytest.raises(OutputError, match=r"partial exists, and may be in use; if it is not, move or remove it"):
        write(out, force=True)


def test_another_users_file_in_a_folder_of_all_is_written_over(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.write_bytes(OLD)
    out.parent.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    before = out.stat().st_ino
    write(out, force=True)
    assert (out.stat().st_ino, out.read_bytes()) == (before, NEW)
    assert replacement.prepare(os.open(out, os.O_RDWR), out, out.stat())
