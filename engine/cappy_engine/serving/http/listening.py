"""Listen where the options say: on a port, or on a unix socket."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Self

from cappy_engine.errors import ServingError, reason_of
from cappy_engine.serving.server_options import ServerOptions

BACKLOG = 2048
FILES_BESIDE = 256
"""The files that a server may have open beside its connections: of models, threads, and connections above the limit."""

log = logging.getLogger("cappy.server")


def with_room(server: ServerOptions) -> ServerOptions:
    """Raise the limit of open files for the connections; returns the options that it allows.

    >>> with_room(ServerOptions(max_connections=100)).max_connections
    100

    Where the system allows fewer connections, the log says so. Without files for them, nobody could tell a client why
    its connection is closed, and probes would not be answered.
    """
    least = server.max_connections + FILES_BESIDE
    for wanted in (least + BACKLOG, least):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            with contextlib.suppress(OSError, OverflowError, ValueError):  # macOS allows less than it says
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY or files >= least:
        return server
    fewer = min(server.max_connections, max(1, files - FILES_BESIDE))
    log.warning(
        "this process may open %d files: %d connections (max_connections is %d), and %d files beside them%s; "
        "raise its hard limit (ulimit -Hn, LimitNOFILE=)",
        files,
        fewer,
        server.max_connections,
        FILES_BESIDE,
        ", so that probes may go unanswered" if files <= FILES_BESIDE else "",
    )
    return replace(server, max_connections=fewer)


class Listener:
    """The socket on which a server listens, and its address for people.

    >>> with Listener.open(ServerOptions(port=0)) as listener:
    ...     listener.address
    'http://127.0.0.1:54321'
    """

    def __init__(self, listening: socket.socket, address: str, path: Path | None = None) -> None:
        self.socket = listening
        self.address = address
        self._path = path
        self._file = None if path is None else _identity(path)

    @classmethod
    def open(cls, server: ServerOptions) -> Self:
        """Listen where the options say. Raises ServingError where that is not possible."""
        path, host = server.unix_socket, server.host
        try:
            if path is not None:
                return cls(_listen_on_path(path), f"unix:{path}", path)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, server.port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            where = str(path) if path is not None else f"{host}, port {server.port}"
            why = reason_of(error).partition(" (while attempting to bind")[0]
            raise ServingError(f"cannot listen on {where}: {why}") from error
        shown = f"[{host}]" if ":" in host else host
        return cls(listening, f"http://{shown}:{listening.getsockname()[1]}")

    def stop(self) -> list[socket.socket]:
        """Listen no more; returns the connections that were made, and that nobody has taken yet.

        Whoever just closes the socket resets them, though their clients may have sent requests. Here that can happen
        only between the last two calls to the system.
        """
        self._remove_file()
        self.socket.setblocking(False)
        waiting: list[socket.socket] = []
        with contextlib.suppress(OSError):  # BlockingIOError: there are no more
            while len(waiting) < BACKLOG:
                waiting.append(self.socket.accept()[0])
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for connected in waiting:
            connected.setblocking(False)
        return waiting

    def close(self) -> None:
        """Listen no more, and remove the unix socket's file. If it is another server's by now, it stays."""
        self._remove_file()
        self.socket.close()

    def _remove_file(self) -> None:
        """Remove the unix socket's file, while its socket is open: no other file can have its number then."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                if _identity(self._path) == self._file:
                    self._path.unlink()
            self._path = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _listen_on_path(path: Path) -> socket.socket:
    """Listen on a unix socket, in place of one on which nobody listens any more; only its owner may connect."""
    listening = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)  # a server that is busy takes no connection now
                if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                    path.unlink()
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
