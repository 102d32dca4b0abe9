"""A server that has as many connections as it may: probes are answered, all others hear 503, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.servers import COMMAND, Server, serving

BODY = json.dumps({"instruction": "Is the sky blue?", "candidates": ["Yes"]})
RANK = f"POST /v1/rank HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
PROBES = ("/health", "/ready", "/ready?by=probe", "/v2/health/live", "/v2/health/ready", "/metrics")


def looked_at(path: str) -> str:
    return f"GET {path} HTTP/1.1\r\nhost: here\r\n\r\n"


def exchanged(server: Server, asked: str) -> bytes:
    """Send what is asked for, and read until the server closes."""
    with server.connect() as connection:
        connection.settimeout(5)
        connection.sendall(asked.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture(scope="module")
def full(bundle: Path) -> Iterator[Server]:
    """Give a server whose two connections are held by requests that are not whole."""
    with (
        serving("--bundle", str(bundle), "--precision", "int8", "--max-connections", "2") as running,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(2):
            stack.enter_context(running.connect()).sendall(RANK.encode())
        yield running


@pytest.mark.parametrize("path", PROBES)
def test_probes_are_answered_above_the_limit_too(full: Server, path: str) -> None:
    answer = exchanged(full, looked_at(path) * 2)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1


def test_connections_and_their_limit_are_counted(full: Server) -> None:
    assert full.metric("cappy_connections") == 3  # and the one that asks
    assert full.metric("cappy_connections_limit") == 2


REFUSED = (RANK + BODY, looked_at("/info"), looked_at("/health-of"), looked_at("/v1/rank?/health"), "GET /hea", "")


@pytest.mark.parametrize("asked", REFUSED, ids=["rank", "info", "a longer path", "a query", "a part", "nothing"])
def test_all_others_hear_503(full: Server, asked: str) -> None:
    refused = 'cappy_refused_requests_total{reason="unhealthy"}'
    before = full.metric(refused)
    answer = exchanged(full, asked)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert full.metric(refused) == before + 1
    failure = json.loads(answer.rpartition(b"\r\n\r\n")[2])
    assert failure["error_type"] == "unhealthy"
    assert (
        failure["error"]
        == "2 connections are open, and no more may be (max_connections); close some, or come again later"
    )
    assert b"\r\nretry-after: 1\r\n" in answer
    assert full.metric('cappy_requests_total{route="other",status="503"}') >= 1


@contextlib.contextmanager
def crowded(bundle: Path, limit: str) -> Iterator[Server]:
    """Give a server with a limit of open files, and 150 connections."""
    command = ("sh", "-c", f'{limit} && exec "$@"', "sh", *COMMAND)
    with (
        serving("--bundle", str(bundle), "--precision", "int8", "--max-connections", "500", command=command) as running,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(150):
            stack.enter_context(running.connect())
        yield running


def test_as_many_connections_as_were_asked_for_are_open_where_the_shell_has_a_lower_limit(bundle: Path) -> None:
    with crowded(bundle, "ulimit -S -n 100") as server:
        assert server.get("/info").status_code == 200
        assert "max_connections" not in server.log


def test_fewer_connections_are_taken_and_told_where_the_system_has_a_lower_limit(bundle: Path) -> None:
    with crowded(bundle, "ulimit -n 400") as server:
        assert exchanged(server, looked_at("/health")).startswith(b"HTTP/1.1 200 ")
        answer = exchanged(server, looked_at("/info"))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"144 connections are open" in answer
        assert (
            "this process may open 400 files: 144 connections (max_connections is 500), and 256 files beside"
            in server.log
        )


def test_a_held_connection_goes_on_when_another_was_refused(bundle: Path) -> None:
    with serving("--bundle", str(bundle), "--precision", "int8", "--max-connections", "1") as server:
        with server.connect() as held:
            held.settimeout(5)
            held.sendall(RANK.encode())
            assert exchanged(server, RANK + BODY).startswith(b"HTTP/1.1 503 ")
            held.sendall(BODY.encode())
            assert held.recv(65536).startswith(b"HTTP/1.1 200 ")
        server.wait_until(lambda: server.get("/info").status_code == 200)
