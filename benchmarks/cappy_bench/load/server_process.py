"""Starts a server in its own process, waits until it is ready, and ends it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cappy_bench.peers.process import last_lines
from cappy_engine.bundle import EMBEDDED
from cappy_engine.errors import BenchmarkError

READY_SECONDS = 120.0
STOP_SECONDS = 60.0
CHOSEN = ("device", "precision", "threads", "mode", "max_batch_tokens")
"""What a server says of the scorer that it opened."""
SERVING = re.compile(r"serving on (http://\S+)")
"""What `cappy serve` prints to stderr once it listens: the port was chosen by the system."""


@dataclass(frozen=True)
class Running:
    """A server that is ready: its address, and its process if we started it.

    `ready_seconds` is the time from the start of the process to the first answer that says it is ready.
    """

    address: tuple[str, int]
    process: subprocess.Popen[bytes] | None = None
    ready_seconds: float | None = None

    @property
    def url(self) -> str:
        """Where it is, without a user's name and password."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def pid(self) -> int | None:
        """The process to watch; None for a server that others started."""
        return None if self.process is None else self.process.pid

    def stop(self) -> int | None:
        """End the process with SIGTERM; returns its status, None if there is no process of ours.

        A server that does not end within a minute is killed: its status is -9.

        >>> running.stop()
        0
        """
        if self.process is None:
            return None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def serve_command(bundle: Path, options: Sequence[str]) -> list[str]:
    """Write the command that serves a bundle on any free port.

    >>> serve_command(Path("bundle"), ["--threads", "2"])[1:5]
    ['-P', '-m', 'cappy_engine', 'serve']
    """
    named = [] if bundle == EMBEDDED else ["--bundle", str(bundle)]
    return [sys.executable, "-P", "-m", "cappy_engine", "serve", "--port", "0", *named, *options]


def start_server(
    command: Sequence[str],
    *,
    log: Path,
    ready: str = "/ready",
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Running:
    """Start a server and wait until the path `ready` answers 200; its output goes to `log`.

    Without a `port` the server chooses one, and says so as `cappy serve` does. Raises BenchmarkError with the last
    lines of the log if it ends, or is not ready in time.

        >>> start_server(serve_command(EMBEDDED, []), log=Path("serve.log")).address
        ('127.0.0.1', 40123)
    """
    begin = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603, the command is ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    address = None if port is None else ("127.0.0.1", port)
    try:
        while time.perf_counter() - begin < READY_SECONDS:
            if process.poll() is not None:
                raise BenchmarkError(f"the server ended with status {process.returncode}: {_last_lines(log)}")
            address = address or _told_address(log)
            if address is not None and _is_ready(address, ready):
                return Running(address, process, time.perf_counter() - begin)
            time.sleep(0.01)
        raise BenchmarkError(f"the server was not ready within {READY_SECONDS:.0f} s: {_last_lines(log)}")
    except BaseException:
        process.kill()
        process.wait()
        raise


def find_server(url: str) -> Running:
    """Find a server that runs already. Raises BenchmarkError if it does not answer that it is ready.

    >>> find_server("http://127.0.0.1:8000").address
    ('127.0.0.1', 8000)
    """
    problem = f"{url} is not the address of a server, such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:  # a port that is not one, or half an IPv6 address
        raise BenchmarkError(problem) from error
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
        raise BenchmarkError(problem)
    address = (parts.hostname, port)
    running = Running(address)
    if not _is_ready(address, "/ready"):
        raise BenchmarkError(f"{running.url}/ready does not answer 200; start the server, or wait until it is ready")
    return running


def is_here(host: str) -> bool:
    """True if a host is this machine: a server may listen only at addresses of its own.

    >>> is_here("localhost"), is_here("192.0.2.1")
    (True, False)
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as listener:
            listener.bind((address[0], 0))
            return True
    return False


def _is_ready(address: tuple[str, int], path: str) -> bool:
    """Tell whether a path answers 200."""
    try:
        return _get(address, path)[0] == http.client.OK
    except (OSError, http.client.HTTPException):
        return False


def read_info(address: tuple[str, int]) -> dict[str, Any]:
    """Read what a server of ours says of itself at /info. Raises BenchmarkError.

    >>> read_info(("127.0.0.1", 8000))["precision"]
    'int8'
    """
    host, port = address
    try:
        status, body = _get(address, "/info")
        info: Any = json.loads(body)
        if status != http.client.OK or not isinstance(info, dict) or not info.keys() >= {*CHOSEN, "limits"}:
            raise BenchmarkError(f"http://{host}:{port}/info answers {status}: it is not a server of cappy's")
        return info
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise BenchmarkError(f"http://{host}:{port}/info cannot be read: {error}") from error


def free_port() -> int:
    """Find a port that nobody uses at the moment. It is for a server that cannot choose one itself.

    >>> free_port()
    40123
    """
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _get(address: tuple[str, int], path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _told_address(log: Path) -> tuple[str, int] | None:
    found = SERVING.search(log.read_text(encoding="utf-8", errors="replace"))
    parts = urlsplit(found[1]) if found else None
    return (parts.hostname, parts.port) if parts and parts.hostname and parts.port else None


def _last_lines(log: Path) -> str:
    return last_lines(log.read_text(encoding="utf-8", errors="replace")) or "it printed nothing"
