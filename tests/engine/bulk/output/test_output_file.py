"""A file that a user named is whole or not there, and belongs to one process until then."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.bulk.output.output_file import open_output
from cappy_engine.bulk.output.places import check_output
from cappy_engine.errors import OutputError
from cappy_engine.storage import NamedFile
from tests.support.written import NEW, OLD, interrupt, names, stop, write

# One process


def test_two_at_once_are_not_mixed_the_second_is_refused(out: Path) -> None:
    with open_output(out) as output:
        output.write(NEW)
        for force in (False, True):
            with pytest.raises(OutputError, match=r"another process writes to .*out\.jsonl\.partial; wait for it"):
                write(out, force=force)
    assert (out.read_bytes(), names(out.parent)) == (NEW, ["out.jsonl"])


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_a_stopped_run_left_is_kept_until_it_is_forced(out: Path, partial: Path, is_killed: bool) -> None:
    if is_killed:
        code = (
            "import os, sys; from pathlib import Path; from cappy_engine.bulk.output.output_file import open_output\n"
            "with open_output(Path(sys.argv[1])) as output:\n"
            f"    output.write({OLD!r}); output.flush(); os.kill(os.getpid(), 9)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(out)], env=environment, check=False)
    else:
        stop(out)
    with pytest.raises(OutputError, match=r"partial holds what a stopped run left; move or remove it, or .* --force"):
        write(out)
    assert partial.read_bytes() == OLD
    assert write(out, force=True) == [f"note: replacing {partial}, which holds what a stopped run left"]
    assert (out.read_bytes(), names(out.parent)) == (NEW, ["out.jsonl"])


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_what_something_else_emptied_or_wrote_to_is_not_given_its_name(tmp_path: Path, name: str, mode: str) -> None:
    out = tmp_path / name

    def write_around() -> None:
        with open_output(out) as output:
            output.write(OLD)
            output.flush()
            with out.with_name(f"{name}.partial").open(mode) as file:
                file.write(b"" if mode == "wb" else b"oops\n")
            output.write(NEW)

    with pytest.raises(OutputError, match=r"\.partial has \d+ bytes, and \d+ were written; remove it and start anew"):
        write_around()
    assert not out.exists()


def test_an_error_names_what_was_written_and_leaves_nothing_where_that_is_nothing(out: Path, partial: Path) -> None:
    said: list[str] = []
    for content in (b"", NEW):
        with pytest.raises(KeyboardInterrupt):
            write(out, content, meanwhile=interrupt, said=said)
    assert said == [f"what was written before this is in {partial}"]
    assert names(out.parent) == [partial.name]


def test_a_full_pipe_that_does_not_block_takes_no_more_as_any_file() -> None:
    """io.BufferedWriter makes a BlockingIOError of it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with NamedFile(writer, "stdout") as file:
        taken = list(iter(lambda: file.write(bytes(2**12)), None))
        assert file.written == sum(taken) > 0
    os.close(reader)


def test_a_packed_output_without_a_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_output(tmp_path / "out.jsonl.gz"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


# Names of our own making


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "fifo"])
@pytest.mark.parametrize("force", [False, True])
def test_a_partial_name_that_is_not_a_file_is_neither_followed_nor_lost(
    kind: str, force: bool, out: Path, partial: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    if kind == "link":
        other.write_bytes(OLD)
    if kind.endswith("link"):
        partial.symlink_to(other)
    elif kind == "folder":
        partial.mkdir()
    else:
        os.mkfifo(partial)
    before = partial.lstat()
    with pytest.raises(OutputError, match=r"partial is in the way, and not a file of ours; move or remove it"):
        write(out, force=force)
    assert partial.lstat() == before
    assert not other.exists() or other.read_bytes() == OLD
    assert not out.exists()


def test_a_foreign_hard_link_of_the_partial_name_keeps_its_content(out: Path, partial: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(OLD)
    partial.hardlink_to(tmp_path / "foreign")
    write(out, force=True)
    assert (tmp_path / "foreign").read_bytes() == OLD


def test_a_partial_file_that_is_moved_meanwhile_is_not_taken_for_another(out: Path, partial: Path) -> None:
    def take() -> None:
        partial.unlink()
        partial.write_bytes(OLD)

    with pytest.raises(OutputError, match="was moved or removed meanwhile"):
        write(out, meanwhile=take)
    assert (partial.read_bytes(), out.exists()) == (OLD, False)


def test_a_target_that_appears_meanwhile_is_kept(out: Path, partial: Path) -> None:
    with pytest.raises(OutputError, match="has appeared meanwhile; move it away, and rename"):
        write(out, meanwhile=lambda: out.write_bytes(OLD))
    assert (out.read_bytes(), partial.read_bytes()) == (OLD, NEW)


# The input


@pytest.mark.parametrize("kind", ["itself", "link", "hard link", "partial", "linked partial"])
def test_the_input_is_never_the_output_by_any_name(kind: str, out: Path, partial: Path, tmp_path: Path) -> None:
    source = partial if kind == "partial" else out if kind == "itself" else tmp_path / "source"
    source.write_bytes(OLD)
    if kind == "hard link":
        out.hardlink_to(source)
    elif kind == "link":
        out.symlink_to(source)
    elif kind == "linked partial":
        partial.symlink_to(source)
    with source.open("rb") as opened:
        for inputs in ([opened], [source]):
            with pytest.raises(OutputError, match=r"the input .* (is the output too|has the name of our unfinished)"):
                write(out, force=True, inputs=inputs)
    assert source.read_bytes() == OLD


# Packed


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.GZ"])
def test_a_name_that_ends_in_gz_is_packed_and_the_same_content_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name)
        found.append((tmp_path / folder / name).read_bytes())
    assert found[0] == found[1]
    assert found[0][4:8] == bytes(4)  # the time
    assert gzip.decompress(found[0]) == NEW


def test_what_was_written_before_an_error_can_be_unpacked(tmp_path: Path) -> None:
    stop(tmp_path / "out.gz")
    assert gzip.decompress((tmp_path / "out.gz.partial").read_bytes()) == OLD


# Streams and descriptors


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/thread-self/fd/{}", "link"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_an_open_descriptor_is_written_to_as_it_is(form: str, kind: str, tmp_path: Path) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        writer = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        reader = os.open(tmp_path / "file", os.O_RDONLY)
        os.write(writer, OLD)
        os.read(reader, len(OLD))
    path = Path(form.format(writer))
    if form == "link":
        path = tmp_path / "link"
        path.symlink_to(f"/dev/fd/{writer}")
    write(path)
    assert os.read(reader, 100) == NEW
    os.close(reader)
    os.close(writer)


def test_a_pipe_with_a_name_is_written_to_and_packed_if_it_is_called_so(tmp_path: Path) -> None:
    for name in ("fifo", "fifo.gz"):
        os.mkfifo(tmp_path / name)
        reader = os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK)
        write(tmp_path / name)
        found = os.read(reader, 100)
        os.close(reader)
        assert (gzip.decompress(found) if name == "fifo.gz" else found) == NEW
    assert names(tmp_path) == ["fifo", "fifo.gz"]


@pytest.mark.parametrize("path", ["/dev/fd/987", "/dev/stdin/x", "absent/out"])
def test_what_cannot_be_written_is_an_error_that_names_it(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=rf"{path}.* cannot be written: "):
        write(Path(path))


def test_a_descriptor_that_is_only_read_is_refused_at_the_start(out: Path) -> None:
    out.write_bytes(OLD)
    with out.open("rb") as opened, pytest.raises(OutputError, match="cannot be written: Bad file descriptor"):
        write(Path(f"/dev/fd/{opened.fileno()}"))


def test_links_that_lead_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "a/out", "c"):
        (tmp_path / "c").unlink(missing_ok=True)
        (tmp_path / "c").symlink_to("c")
        with pytest.raises(OutputError, match="cannot be written: Too many levels of symbolic links"):
            check_output(tmp_path / name, force=True)


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_folder_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="is a folder; the output must be a file, not a folder"):
        check_output(Path(name), force=True)
