"""Where a server listens: a unix socket is not taken from a server that uses it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

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
