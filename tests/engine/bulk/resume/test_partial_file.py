"""A file that grows: a run that was stopped goes on as if it had not been, and nothing else is taken for it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.bulk.resume.names import Names, find_names
from cappy_engine.bulk.resume.partial_file import open_growing
from cappy_engine.errors import OutputError

LINES = [f'{{"line": "é {number}"}}\n'.encode() for number in range(7)]
SETTINGS = {"model": {"name": "m", "limits": {"new": 3}}, "seed": 0}
ORIGIN = {"versions": {"python": "1"}}


def grow(
    target: Path, *, stop: int | None = None, resume: bool = False, force: bool = False,
    settings: Any = SETTINGS, origin: Any = ORIGIN, say: Callable[[str], object] = print,
    after: Callable[[int], object] = lambda done: None,
) -> int:  # fmt: skip
    """Write LINES line by line, up to `stop`; returns how many were there."""
    names = find_names(target, resume=resume, force=force)
    with open_growing(names, resume=resume) as growing:
        there = 0
        if resume:
            there = len(list(growing.complete_lines(say)))
            growing.check_settings(settings, origin, say)
        else:
            growing.begin(settings, origin)
        for number in range(there, len(LINES)):
            if number == stop:
                raise KeyboardInterrupt
            growing.append(LINES[number])
            after(number + 1)
        growing.finish()
    return there


def stopped(target: Path, *, after: int = 3) -> Path:
    """A run that was interrupted when `after` lines were written; returns its partial file."""
    with pytest.raises(KeyboardInterrupt):
        grow(target, stop=after)
    return Names(target).partial


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_file_has_its_name_when_it_is_complete_and_its_settings_beside_it(out: Path) -> None:
    seen: list[list[str]] = []
    grow(out, after=lambda done: seen.append(sorted(path.name for path in out.parent.iterdir())))
    assert seen == [["out.jsonl.partial", "out.jsonl.settings.json"]] * 7
    assert out.read_bytes() == b"".join(LINES)
    assert json.loads(Names(out).settings.read_text()) == {**SETTINGS, **ORIGIN}
    assert not Names(out).partial.exists()
    plain = out.with_name("plain")
    plain.touch()
    assert out.stat().st_mode == plain.stat().st_mode


def test_a_run_that_was_stopped_goes_on(out: Path) -> None:
    partial = stopped(out)
    assert partial.read_bytes() == b"".join(LINES[:3])
    assert grow(out, resume=True) == 3
    assert out.read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("kept", [0, 1, 20, 60, 10_000], ids=lambda kept: f"{kept} bytes left")
def test_a_file_torn_anywhere_goes_on_after_its_last_complete_line(kept: int, out: Path) -> None:
    partial = stopped(out, after=6)
    left = partial.read_bytes()[:kept]
    partial.write_bytes(left)
    said: list[str] = []
    assert grow(out, resume=True, say=said.append) == left.count(b"\n")
    assert out.read_bytes() == b"".join(LINES)
    is_torn = bool(left) and not left.endswith(b"\n")
    assert said == [f"the last line of {partial} is torn; it is made again"] * is_torn


def test_a_run_that_is_killed_goes_on(out: Path) -> None:
    code = (
        f"import sys, time\nfrom {__name__} import *\n"
        "def after(done):\n    if done == 5:\n        print('five', flush=True); time.sleep(60)\n"
        "grow(Path(sys.argv[1]), after=after)"
    )
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"five\n"
        running.send_signal(signal.SIGKILL)
    assert grow(out, resume=True) == 5
    assert out.read_bytes() == b"".join(LINES)


# Settings


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({**SETTINGS, "seed": 1}, "seed was 0, is 1"),
        ({**SETTINGS, "model": {"name": "m", "limits": {"new": 4}}}, "model.limits.new was 3, is 4"),
        ({"seed": 0, "model": {"name": "m"}}, "model.limits.new was 3, is not set"),
        ({**SETTINGS, "mode": "x", "seed": 2}, "mode was not set, is x; seed was 0, is 2"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_a_run_goes_on_only_with_its_own_settings(settings: dict[str, Any], shown: str, out: Path) -> None:
    partial = stopped(out)
    with pytest.raises(OutputError) as caught:
        grow(out, resume=True, settings=settings)
    assert str(caught.value) == (
        f"{partial} belongs to another run ({shown}); go on as it began, or remove it and start anew"
    )
    assert partial.read_bytes() == b"".join(LINES[:3])


def test_another_origin_may_go_on_and_every_one_is_kept(out: Path) -> None:
    partial = stopped(out)
    said: list[str] = []
    for version, stop in (("2", 5), ("2", 6), ("3", None)):
        try:
            grow(out, resume=True, origin={"versions": {"python": version}}, stop=stop, say=said.append)
        except KeyboardInterrupt:
            continue
    settings = json.loads(Names(out).settings.read_text())
    assert settings == {
        **SETTINGS, **ORIGIN, "resumed_with": [{"versions": {"python": "2"}}, {"versions": {"python": "3"}}],
    }  # fmt: skip
    assert said == [
        f"note: {partial} goes on with what is not as before: versions.python was {before}, is {after}"
        for before, after in (("1", "2"), ("2", "3"))
    ]


@pytest.mark.parametrize("content", [None, b"[]", b"{", b"\xff"], ids=repr)
def test_a_run_that_lost_its_settings_is_refused(content: bytes | None, out: Path) -> None:
    stopped(out)
    Names(out).settings.unlink()
    if content is not None:
        Names(out).settings.write_bytes(content)
    with pytest.raises(OutputError, match=r"out\.jsonl\.partial has lost its settings .* remove it and start anew"):
        grow(out, resume=True)


# What is refused


def test_nothing_is_overwritten(out: Path) -> None:
    with pytest.raises(OutputError, match=r"nothing to resume: .*out.jsonl.partial does not exist; leave out --resume"):
        grow(out, resume=True)
    stopped(out)
    with pytest.raises(
        OutputError,
        match=r"out.jsonl.partial holds what a stopped run left, or one that still writes; go on with --resume, or",
    ):
        grow(out)
    grow(out, resume=True)
    for resume in (True, False):
        with pytest.raises(OutputError, match=r"out.jsonl exists; choose another name, or replace it with --force"):
            grow(out, resume=resume)


def test_with_force_a_file_and_what_a_stopped_run_left_are_replaced(out: Path) -> None:
    out.write_text("of another run")
    out.chmod(0o640)
    out.with_name("link").symlink_to(out)
    with pytest.raises(KeyboardInterrupt):
        grow(out, stop=3, force=True)
    assert out.read_text() == "of another run"
    assert grow(out.with_name("link"), resume=True, force=True) == 3
    assert out.read_bytes() == b"".join(LINES)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    with pytest.raises(KeyboardInterrupt):
        grow(out, stop=3, force=True)
    assert grow(out, force=True) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["link", "out.jsonl", "out.jsonl.settings.json"]


@pytest.mark.parametrize("content", [b"mine", b'{"seed": 0}', b"[]", None], ids=repr)
def test_a_foreign_file_of_the_settings_name_is_not_lost(content: bytes | None, out: Path) -> None:
    settings, other = Names(out).settings, out.with_name("other")
    if content is None:
        other.write_text(json.dumps({**SETTINGS, **ORIGIN}))
        settings.symlink_to(other)
    else:
        settings.write_bytes(content)
    with pytest.raises(OutputError, match=r"settings\.json is in the way, and not of such a run; move or remove it"):
        grow(out, force=True)
    assert settings.is_symlink() if content is None else settings.read_bytes() == content
    assert not Names(out).partial.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_partial_file_that_is_a_link_is_not_followed(resume: bool, out: Path) -> None:
    other = out.with_name("other")
    other.write_bytes(LINES[0])
    Names(out).partial.symlink_to(other)
    with pytest.raises(OutputError, match="partial"):
        grow(out, resume=resume, force=True)
    assert other.read_bytes() == LINES[0]


def test_a_target_that_appears_meanwhile_is_kept_and_so_are_the_lines(out: Path) -> None:
    with pytest.raises(OutputError, match=r"out.jsonl has appeared meanwhile; move it away, and finish with --resume"):
        grow(out, after=lambda done: out.write_text("not ours"))
    assert out.read_text() == "not ours"
    out.unlink()
    assert grow(out, resume=True) == 7


def test_two_runs_do_not_write_to_one_file(out: Path) -> None:
    def again(done: int) -> None:
        with pytest.raises(OutputError, match=r"another run writes to .*partial; wait for it, or stop it"):
            grow(out, resume=True)

    grow(out, after=again)
    assert out.read_bytes() == b"".join(LINES)


def test_a_run_that_is_removed_leaves_nothing(out: Path) -> None:
    with open_growing(Names(out), resume=False) as growing:
        growing.begin(SETTINGS, ORIGIN)
        growing.append(LINES[0])
        growing.remove()
    assert list(out.parent.iterdir()) == []


def test_a_disk_that_is_full_is_an_error_that_names_the_file_and_how_to_go_on(out: Path) -> None:
    """What the buffer still holds fails again when the file is closed; that must not hide the first error."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int) -> None:
        if done == 3:
            size = Names(out).partial.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))

    try:
        with pytest.raises(OutputError, match=r"out.jsonl.partial cannot be written: .*; go on with --resume once"):
            grow(out, after=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert grow(out, resume=True) == 3
    assert out.read_bytes() == b"".join(LINES)


def test_a_file_system_without_locks_is_not_taken_for_another_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match=r"out.jsonl.partial cannot be locked: .*No locks available; choose a folder"):
        grow(out)
    assert list(out.parent.iterdir()) == []


def test_settings_that_cannot_be_written_leave_nothing_in_the_way(out: Path) -> None:
    with pytest.raises(OutputError, match=r"out.jsonl.settings.json cannot be written"):
        grow(out, settings={"seed": float("nan")})
    assert list(out.parent.iterdir()) == []
    grow(out, settings={"name": "\ud800"})
    assert json.loads(out.with_name("out.jsonl.settings.json").read_bytes())["name"] == "\ud800"


def test_a_folder_that_cannot_be_made_is_an_error(out: Path) -> None:
    out.touch()
    with pytest.raises(OutputError, match=r"more.jsonl cannot be written: Not a directory"):
        grow(out / "more.jsonl")


def test_a_folder_of_the_target_is_made(out: Path) -> None:
    grow(out.parent / "new" / "out.jsonl")
    names: Sequence[str] = sorted(path.name for path in (out.parent / "new").iterdir())
    assert names == ["out.jsonl", "out.jsonl.settings.json"]
