"""The head of a request is what RFC 9112 says, or it is refused: version, host, and how the body is written."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.servers import Server

LAST = "connection: close\r\n\r\n"
HOST = "host: here\r\n"


def exchanged(server: Server, sent: str) -> list[tuple[int, str]]:
    """Send requests, and read until the server closes; return the status and the body of each answer."""
    with server.connect() as connection:
        connection.sendall(sent.encode("latin-1"))
        received = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    answers = re.split(r"HTTP/1\.1 (?=\d{3} )", received)[1:]
    return [(int(answer[:3]), answer.partition("\r\n\r\n")[2]) for answer in answers]


@pytest.mark.parametrize(
    ("head", "status", "why"),
    [
        ("HTTP/2.0", 505, "the request is of HTTP/2.0, and the server speaks HTTP/1.1; send it so"),
        ("HTTP/0.9", 505, "the request is of HTTP/0.9, and the server speaks HTTP/1.1; send it so"),
        ("HTTP/1.1", 400, "the request has no Host; send one, which HTTP/1.1 needs"),
        (f"HTTP/1.1\r\n{HOST}Host: here", 400, "the request has 2 headers Host; send one"),
        (f"HTTP/1.0\r\n{HOST}host: there\r\nhost: here", 400, "the request has 3 headers Host; send one"),
        ("HTTP/1.1\r\nhost: he re", 400, "the Host 'he re' is not a name of a host; send the one that was called"),
        ("HTTP/1.1\r\nhost: here, there", 400, "the Host 'here, there' is not a name of a host; "),
        ("HTTP/1.1\r\nhost: a\xe9" + "b" * 500, 400, "the Host 'a\\xe9" + "b" * 78 + "' is not a name of a host; "),
    ],
)
def test_a_head_that_http_does_not_allow_is_refused(server: Server, head: str, status: int, why: str) -> None:
    line = f'cappy_requests_total{{route="other",status="{status}"}}'
    for path in ("GET /health", "GET /nothing", "POST /v1/score"):
        before = server.metric(line) if line in server.get("/metrics").text else 0
        ((found, body),) = exchanged(server, f"{path} {head}\r\n{LAST}")
        assert (found, json.loads(body)["error_type"]) == (status, "validation")
        assert json.loads(body)["error"].startswith(why)
        assert server.metric(line) == before + 1


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.0",
        "HTTP/1.0\r\nhost: here",
        "HTTP/1.1\r\nHost:",
        "HTTP/1.1\r\nHost: here:8000 \t",
        "HTTP/1.1\r\nhost: my_host.example.org.:8000",
        "HTTP/1.1\r\nhost: [::1]:8000",
        "HTTP/1.1\r\nhost: %2Frun%2Fcappy.sock",
    ],
)
def test_a_head_that_http_allows_is_answered(server: Server, head: str) -> None:
    assert exchanged(server, f"GET /health {head}\r\n{LAST}") == [(200, '{"status":"alive"}')]


def test_requests_before_a_head_that_is_refused_are_answered(server: Server) -> None:
    alive = f"GET /health HTTP/1.1\r\n{HOST}\r\n"
    offer = f"GET /health HTTP/1.1\r\n{HOST}connection: upgrade\r\nupgrade: h2c\r\n\r\n"
    for before in (alive, offer):
        found = exchanged(server, f"{before}GET /health HTTP/1.1\r\n\r\n{alive}")
        assert found[0] == (200, '{"status":"alive"}')
        assert 200 not in dict(found[1:])
    assert exchanged(server, offer.replace(HOST, ""))[0][0] == 400


POST = f"POST /v1/score HTTP/1.1\r\n{HOST}content-type: application/json\r\n"
BODY = '{"pairs":[{"instruction":"Is the sky blue?","response":"Yes"}]}'
CHUNKS = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "coding"),
    [
        ("transfer-encoding: gzip, chunked\r\n", "gzip, chunked"),
        ("transfer-encoding: gzip\r\nTransfer-Encoding: chunked\r\n", "gzip, chunked"),
        ("transfer-encoding: identity, chunked\r\n", "identity, chunked"),
        ("transfer-encoding: " + "x" * 100 + ", chunked\r\n", "x" * 80),
    ],
)
def test_a_transfer_coding_beside_chunked_is_not_understood(server: Server, headers: str, coding: str) -> None:
    ((status, body),) = exchanged(server, f"{POST}{headers}\r\n{CHUNKS}GET /health HTTP/1.1\r\n{HOST}{LAST}")
    assert status == 501
    assert json.loads(body)["error"] == f"the Transfer-Encoding is {coding!r}, and only chunked is taken; send it so"


@pytest.mark.parametrize("value", ["chunked, chunked", "chunked\r\ntransfer-encoding: chunked", "chunked, gzip"])
def test_a_body_whose_end_cannot_be_found_is_refused(server: Server, value: str) -> None:
    ((status, _),) = exchanged(server, f"{POST}transfer-encoding: {value}\r\n\r\n{CHUNKS}")
    assert status == 400


@pytest.mark.parametrize("value", ["chunked", "Chunked", ", chunked", "  chunked "])
def test_a_chunked_body_is_taken(server: Server, value: str) -> None:
    ((status, _),) = exchanged(server, f"{POST}transfer-encoding: {value}\r\n{LAST}{CHUNKS}")
    assert status == 200


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("identity", "gzip"), 415),
        (("", "gzip"), 415),
        (("gzip", "identity"), 415),
        (("identity, br",), 415),
        (("identity", "Identity"), 200),
        (("identity ,",), 200),
    ],
)
def test_every_content_encoding_counts(server: Server, lines: tuple[str, ...], status: int) -> None:
    headers = "".join(f"content-encoding: {line}\r\n" for line in lines)
    ((found, body),) = exchanged(server, f"{POST}content-length: {len(BODY)}\r\n{headers}{LAST}{BODY}")
    assert found == status
    assert ("packed bodies are not taken" in body) == (status == 415)
