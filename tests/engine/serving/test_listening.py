"""Where a server listens: a unix socket is not taken from a server that uses it."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cappy_engine.errors import ServingError
from cappy_engine.serving.http.listening import Listener
from cappy_engine.serving.server_options import ServerOptions


def test_a_server_leaves_the_unix_socket_of_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    options = ServerOptions(unix_socket=path)
    with Listener.open(options) as old:
        path.unlink()  # by somebody else
        with Listener.open(options) as new:
            old.close()
            assert path.is_socket()
        assert not path.exists()
    with Listener.open(options) as new:
        assert new.address == f"unix:{path}"
        old.close()  # once more, at its end
        assert path.is_socket()


def test_a_server_that_has_no_time_for_connections_keeps_its_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with contextlib.ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(ServingError, match="Address already in use"):
            Listener.open(ServerOptions(unix_socket=path))
    assert path.is_socket()


def test_nobody_is_taken_after_the_end() -> None:
    with Listener.open(ServerOptions(port=0)) as listener:
        address = listener.socket.getsockname()
        socket.create_connection(address, timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)


def test_a_file_that_is_no_socket_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(ServingError, match="Address already in use"):
        Listener.open(ServerOptions(unix_socket=path))
    assert path.read_text() == "mine"


def test_files_that_are_made_later_have_their_usual_rights(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with Listener.open(ServerOptions(unix_socket=tmp_path / "socket")):
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_an_address_of_ipv6_is_one_that_clients_take() -> None:
    try:
        with Listener.open(ServerOptions(host="::1", port=0)) as listener:
            port = listener.socket.getsockname()[1]
            assert listener.address == f"http://[::1]:{port}"
            socket.create_connection(("::1", port), timeout=5).close()
    except ServingError:
        pytest.skip("needs IPv6")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"host": "::"}, "can be reached by others"),
        ({"host": ""}, "can be reached by others"),
        ({"model_names": ("tiny", "")}, "printable characters only"),
        ({"model_names": ("a\nb",)}, "printable characters only"),
        ({"body_seconds": float("nan")}, "body_seconds must be finite"),
    ],
)
def test_options_that_no_server_has_are_refused(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ServerOptions(**wrong)
