"""Start `cappy serve` in a process of its own, and speak HTTP with it down to the bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.places import ROOT

SECONDS = 30
COMMAND = (sys.executable, "-c", "from cappy_engine.cli.main import main; raise SystemExit(main())")
"""The command line of the tests' own environment."""


class Server:
    """A server that runs: its `url`, its process, and the lines that it wrote to stderr."""

    def __init__(self, process: subprocess.Popen[str], client: httpx.Client) -> None:
        self.process = process
        self.client = client
        self.lines: list[str] = []
        self.url = ""
        self._is_told = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Wait until it serves; raises AssertionError with its log if it ends before."""
        assert self._is_told.wait(SECONDS), self.log
        assert self.url, self.log
        if self.url.startswith("http"):
            self.client.base_url = httpx.URL(self.url)

    def post(self, path: str, document: Any, **headers: str) -> httpx.Response:
        """Post a document."""
        return self.client.post(
            path, json=document, headers={name.replace("_", "-"): headers[name] for name in headers}
        )

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Get a path."""
        return self.client.get(path, headers=_named(headers))

    def metric(self, line: str) -> float:
        """Give the value of a metric, by its name and labels."""
        for found in self.get("/metrics").text.splitlines():
            if found.startswith(f"{line} "):
                return float(found.rpartition(" ")[2])
        raise AssertionError(f"no metric {line}")

    def connect(self) -> socket.socket:
        """Open a connection."""
        if self.url.startswith("unix:"):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(SECONDS)
            client.connect(self.url.removeprefix("unix:"))
            return client
        address = httpx.URL(self.url)
        return socket.create_connection((address.host, address.port or 80), timeout=SECONDS)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; returns the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; returns the exit status."""
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return status

    def wait_for_line(self, part: str) -> str:
        """Wait for a line of the log that holds `part`."""
        self.wait_until(lambda: part in self.log)
        return next(line for line in self.lines if part in line)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Ask again and again; raises AssertionError with the log where it does not become true."""
        ends = time.monotonic() + SECONDS
        while not is_so():
            assert time.monotonic() < ends, self.log
            time.sleep(0.01)

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            _, found, address = line.partition("serving on ")
            if found:
                self.url = address.strip().partition('"')[0]
                self._is_told.set()
        self._is_told.set()


def _named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextlib.contextmanager
def started(
    options: Sequence[str] = (),
    *,
    command: Sequence[str] = COMMAND,
    variables: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server that may still be loading; yields it, and ends it."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("CAPPY_SERVE_")}
    has_place = "--port" in options or "--unix-socket" in options
    words = [*command, "serve", *([] if has_place else ["--port", "0"]), *options]
    with (
        subprocess.Popen(
            words,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**surroundings, **(variables or {})},
        ) as process,
        httpx.Client(timeout=SECONDS, trust_env=False, headers=headers) as client,
    ):
        try:
            yield Server(process, client)
        finally:
            process.kill()


@contextlib.contextmanager
def serving(
    *options: str,
    command: Sequence[str] = COMMAND,
    variables: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server and wait until it is ready; yields it, and ends it.

    >>> with serving("--bundle", str(TINY)) as server:
    ...     server.get("/ready").json()
    {'status': 'ready'}
    """
    with started(options, command=command, variables=variables, headers=headers) as server:
        server.wait_until_ready()
        yield server


def faulty(fault: str, trigger: Path) -> tuple[str, ...]:
    """Give a command like `cappy`, whose model has a fault from when the file `trigger` exists."""
    return (sys.executable, "-m", "tests.support.faulty_cappy", fault, str(trigger))


def pairs_of(*texts: tuple[str, str]) -> dict[str, Any]:
    """Make the document of /v1/score."""
    return {"pairs": [{"instruction": instruction, "response": response} for instruction, response in texts]}
