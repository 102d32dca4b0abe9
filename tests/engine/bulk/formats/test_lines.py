"""Lines of any length are read with bounded memory, and a stream that pauses is noticed."""

from __future__ import annotations

import gzip
import io
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.bulk.formats import lines as reading
from cappy_engine.bulk.formats.lines import Lines, check_length, numbered
from cappy_engine.bulk.resume import partial_file
from cappy_engine.bulk.resume.names import Names
from cappy_engine.bulk.resume.partial_file import open_growing
from cappy_engine.errors import InvalidLine, OutputError

LIMIT = 10


def piped(*parts: bytes | float) -> BinaryIO:
    """Open a pipe into which bytes are written, with pauses of so many seconds."""
    reader, writer = os.pipe()

    def write() -> None:
        for part in parts:
            if isinstance(part, bytes):
                os.write(writer, part)
            else:
                time.sleep(part)
        os.close(writer)

    threading.Thread(target=write).start()
    return os.fdopen(reader, "rb")


def kinds(content: bytes, tmp_path: Path) -> list[Iterable[bytes]]:
    """The same content as a file, a packed file, a pipe, and a list of lines."""
    plain, packed = tmp_path / "plain", tmp_path / "packed.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    return [plain.open("rb"), io.BytesIO(content), gzip.open(packed), piped(content), content.splitlines(keepends=True)]


# The limit


@pytest.mark.parametrize("length", [0, 9, 10, 11, 12, 25, 9000])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_beyond_the_limit_is_refused_by_its_number_in_every_kind_of_input(
    length: int, end: bytes, tmp_path: Path
) -> None:
    content = b"one\n" + b"x" * length + end
    for found in kinds(content, tmp_path):
        if length > LIMIT:
            with pytest.raises(InvalidLine, match=r"^line 2: is longer than 10 bytes \(max_line_bytes\)$"):
                list(numbered(found, LIMIT))
        else:
            assert b"".join(line for _, line in numbered(found, LIMIT)) == content


@given(content=st.lists(st.sampled_from([b"\n", b"x", b"y" * 9, b"z" * 10, b"w" * 30]), max_size=12).map(b"".join))
def test_the_reading_goes_on_behind_a_line_that_is_too_long(content: bytes) -> None:
    source = Lines(io.BytesIO(content), LIMIT)
    expected = content.splitlines(keepends=True)
    for line, whole in zip(source, expected, strict=True):
        assert line is not None
        assert line == whole[: LIMIT + 1]
    assert source.bytes_read == len(content)


def test_a_line_without_an_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/zero").open("rb") as zeros, pytest.raises(InvalidLine, match=r"^line 1: is longer than 1048576 "):
        list(numbered(zeros, 2**20))
    monkeypatch.setattr(reading, "SKIPPED_AT_A_TIME", 2**16)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(8):
            file.write(bytes(2**20))
        file.write(b"\nlast\n")
    packed.seek(0)
    source = Lines(gzip.GzipFile(fileobj=packed), 100)
    assert [len(line or b"") for line in source] == [101, 5]
    assert source.bytes_read == 8 * 2**20 + 6


@pytest.mark.parametrize("line", [b"1234567890", b"1234567890\n"])
def test_the_end_of_a_line_does_not_count(line: bytes) -> None:
    check_length(line, 1, LIMIT)
    with pytest.raises(InvalidLine):
        check_length(b"x" + line, 1, LIMIT)


# Pauses


def test_a_pipe_that_pauses_is_noticed_once_complete_lines_came() -> None:
    found = list(Lines(piped(b"one\ntw", 0.2, b"o\nthree\nfour", 0.15), 100))
    assert found == [b"one\n", None, b"two\n", b"three\n", None, b"four"]


def test_a_busy_pipe_is_not_held_back_longer_than_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_WAIT_SECONDS", 0.1)
    found = list(Lines(piped(*(part for _ in range(20) for part in (b"line\n", 0.02))), 100))
    assert found.count(b"line\n") == 20
    assert 1 <= found.count(None) < 10


def test_a_socket_pauses_too() -> None:
    here, there = socket.socketpair()
    there.sendall(b"one\n")
    source = iter(Lines(here.makefile("rb"), 100))
    assert next(source) == b"one\n"
    there.close()
    assert list(source) == []
    os.set_blocking(here.fileno(), True)


def test_what_was_read_ahead_of_us_is_not_lost_and_neither_is_what_is_behind_us() -> None:
    file = piped(b"header\n1\n2\n3\n4\n")
    assert file.readline() == b"header\n"
    source = iter(Lines(file, 100))
    assert [next(source), next(source)] == [b"1\n", b"2\n"]
    assert file.readline() == b"3\n"


def test_a_pipe_that_does_not_block_is_read_to_its_end() -> None:
    file = piped(0.05, b"one\n", 0.02, b"two\n")
    os.set_blocking(file.fileno(), False)
    assert [line for line in Lines(file, 100) if line] == [b"one\n", b"two\n"]


def test_large_lines_of_a_pipe_come_whole() -> None:
    content = b"".join(b"%d" % (number % 10) * (number * 997 % 30_000) + b"\n" for number in range(200))
    assert b"".join(line for line in Lines(piped(content), 2**20) if line) == content


def test_a_line_of_an_unfinished_output_has_a_limit_and_is_not_taken_for_a_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_file, "MOST_LINE_BYTES", LIMIT)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(b"short\n" + b"x" * 5 * LIMIT + b"\nlast\n")
    before = partial.read_bytes()
    with open_growing(Names(tmp_path / "out.jsonl"), resume=True) as file:
        lines = file.complete_lines(print)
        assert next(lines) == b"short\n"
        with pytest.raises(OutputError, match=r"out\.jsonl\.partial, line 2: is longer than 10 bytes.*start anew"):
            next(lines)
    assert partial.read_bytes() == before
