"""What a connection may do: memory, time and unread bytes are bounded, and a client hears why it was refused."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.servers import SECONDS, Server, serving

SKY = "Is the sky blue?"
HEAD = "POST /v1/rank HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
BODY = json.dumps({"instruction": SKY, "candidates": ["Yes"]})
HEALTH = "GET /health HTTP/1.1\r\nhost: here\r\n"
LAST = f"{HEALTH}connection: close\r\n\r\n"
TENSORS = {
    "inputs": [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": ["Yes"]} for name in ("instruction", "response")
    ]
}
SHAPE = {"error", "error_type", "message", "pair"}
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def narrow(bundle: Path) -> Iterator[Server]:
    """Give a server that waits for nobody."""
    options = "--precision int8 --max-body-bytes 2000000 --body-seconds 0.4 --idle-seconds 0.4 --max-connections 50"
    with serving("--bundle", str(bundle), *options.split()) as running:
        yield running


def posted(body: str, headers: str = "") -> str:
    """Write a request to rank."""
    return f"{HEAD}{headers}content-length: {len(body)}\r\n\r\n{body}"


def exchanged(server: Server, *parts: str | bytes, pause: float = 0) -> bytes:
    """Send parts with a pause between them, and read until the server closes."""
    with server.connect() as connection:
        connection.settimeout(5)
        for number, part in enumerate(parts):
            time.sleep(pause if number else 0)
            connection.sendall(part if isinstance(part, bytes) else part.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def failure(answer: bytes) -> dict[str, object]:
    """Read the document of a refusal."""
    found: dict[str, object] = json.loads(answer.rpartition(b"\r\n\r\n")[2])
    return found


def memory(server: Server) -> int:
    """Give the bytes of memory that the server holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def send_for(connection: socket.socket, block: bytes, size: int) -> None:
    """Send a block again and again, until `size` bytes are sent, or the server takes no more of them."""
    connection.settimeout(0.3)
    with contextlib.suppress(OSError):
        for _ in range(size // len(block)):
            connection.sendall(block)


def test_only_a_client_of_http_1_1_is_told_to_go_on(narrow: Server) -> None:
    head = HEAD + f"expect: 100-continue\r\nconnection: close\r\ncontent-length: {len(BODY)}\r\n\r\n"
    assert exchanged(narrow, head, BODY, pause=0.1).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    old = exchanged(narrow, head.replace("HTTP/1.1", "HTTP/1.0"), BODY, pause=0.1)
    assert old.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("kind", ["small posts", "large posts", "gets with bodies", "trailers", "one trailer"])
def test_a_connection_that_sends_without_end_costs_little_memory(narrow: Server, kind: str) -> None:
    body = '{"pairs":[]' + " " * 40000 + "}"
    start, block = {
        "small posts": ("", posted("{}") * 500),
        "large posts": ("", posted(body) * 20),
        "gets with bodies": ("", f"{HEALTH}content-length: {len(body)}\r\n\r\n{body}" * 20),
        "trailers": (f"{HEALTH}transfer-encoding: chunked\r\n\r\n0\r\n", f"x: {'y' * 1000}\r\n" * 60),
        "one trailer": (f"{HEALTH}transfer-encoding: chunked\r\n\r\n0\r\nx: ", "y" * 60000),
    }[kind]
    before = memory(narrow)
    with narrow.connect() as connection:
        connection.sendall(start.encode())
        send_for(connection, block.encode(), 64 * MEGABYTE)
        assert memory(narrow) - before < 16 * MEGABYTE


def test_what_waits_on_a_connection_is_answered_and_then_it_is_closed(narrow: Server) -> None:
    answer = exchanged(narrow, posted(BODY) * 300)
    assert 16 <= answer.count(b"HTTP/1.1 200 ") < 100
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 200 ")
    assert answer.count(b"connection: close") == 1


def test_large_bodies_behind_each_other_are_all_answered(narrow: Server) -> None:
    large = posted(BODY + " " * 100_000)
    assert exchanged(narrow, large * 8 + LAST).count(b"HTTP/1.1 200 ") == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        (f"{HEALTH}content-length: 10\r\n\r\n", "x"),
        ("POST /nothing HTTP/1.1\r\nhost: here\r\ncontent-length: 4\r\n\r\n", "xxxx"),
        (f"{HEALTH}\r\n", "\r\n"),
    ],
    ids=["half a body", "a late body", "an empty line"],
)
def test_bytes_after_an_answer_do_not_keep_a_connection_open(narrow: Server, parts: tuple[str, ...]) -> None:
    assert exchanged(narrow, *parts, pause=0.1).count(b"HTTP/1.1 ") == 1


def test_an_answer_to_a_body_that_was_not_read_says_that_the_connection_is_closed(narrow: Server) -> None:
    unread = exchanged(narrow, "POST /nothing HTTP/1.1\r\nhost: here\r\ncontent-length: 4\r\n\r\n")
    assert b"connection: close" in unread
    read = exchanged(narrow, "POST /nothing HTTP/1.1\r\nhost: here\r\ncontent-length: 4\r\n\r\nxxxx", LAST, pause=0.1)
    assert read.count(b"HTTP/1.1 ") == 2


def test_a_connection_goes_on_after_a_request_that_was_refused(narrow: Server) -> None:
    answer = exchanged(narrow, posted("{}"), LAST, pause=0.1)
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert answer.count(b"HTTP/1.1 200 ") == 1


def test_a_client_that_offers_http2_is_answered_twice(narrow: Server) -> None:
    offer = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    assert exchanged(narrow, posted(BODY, offer), posted(BODY, offer), LAST, pause=0.1).count(b" 200 OK") == 3
    assert exchanged(narrow, f"{HEALTH}{offer}\r\n" * 2 + LAST).count(b" 200 OK") == 3


def test_a_client_that_sends_far_too_much_hears_that_it_is_too_much(narrow: Server) -> None:
    place = httpx.URL(narrow.url)
    connection = http.client.HTTPConnection(place.host, place.port, timeout=5)
    connection.request("POST", "/v1/score", body=b" " * 20 * MEGABYTE, headers={"content-type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()


def test_a_large_body_with_the_next_head_behind_it_is_not_a_large_head(narrow: Server) -> None:
    answer = exchanged(narrow, posted(BODY + " " * 90_000) + HEALTH[:20], f"{HEALTH[20:]}connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        ("not http\r\n\r\n", "not valid HTTP"),
        ("\x16\x03\x01\x02\0\1\0\1", "neither HTTP/2 nor TLS"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "neither HTTP/2 nor TLS"),
        (f"{HEAD}" + "x: y\r\n" * 20000, "more than 65536 bytes"),
        (f"{HEAD}x: " + "y" * MEGABYTE, "more than 65536 bytes"),
        (f"{HEAD}content-length: 3\r\ncontent-length: 4\r\n\r\n", "not valid HTTP"),
        (f"{HEAD}transfer-encoding: chunked\r\n\r\nzz\r\n", "not valid HTTP"),
    ],
)
def test_what_is_not_http_is_refused_in_the_shape_of_all_errors(narrow: Server, sent: str, part: str) -> None:
    answer = exchanged(narrow, sent)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nconnection: close\r\n" in answer
    assert set(failure(answer)) == SHAPE
    assert part in str(failure(answer)["error"])


@pytest.mark.parametrize("wrong", ["not http\r\n\r\n", f"{HEAD}transfer-encoding: chunked\r\n\r\nzz\r\n"])
def test_what_is_not_http_does_not_take_the_place_of_an_answer(narrow: Server, wrong: str) -> None:
    answer = exchanged(narrow, posted(BODY) + wrong)
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"connection: close") == 1
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"response":"Yes"' in answer


def test_as_many_connections_as_the_limit_says_are_answered(narrow: Server) -> None:
    def answered() -> int:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(narrow.connect()) for _ in range(52)]
            for connection in opened:
                with contextlib.suppress(OSError):
                    connection.sendall(b"GET /info HTTP/1.1\r\nhost: here\r\n\r\n")
            return [connection.recv(12) for connection in opened].count(b"HTTP/1.1 200")

    narrow.wait_until(lambda: answered() == 50)  # when those of the other tests are gone


def test_what_is_not_http_is_counted_too(narrow: Server) -> None:
    def is_refused() -> bool:  # not before connections of other tests are closed: few may be open
        return exchanged(narrow, "not http\r\n\r\n").startswith(b"HTTP/1.1 400 ")

    line = 'cappy_requests_total{route="other",status="400"}'
    narrow.wait_until(is_refused)
    before = narrow.metric(line)
    narrow.wait_until(is_refused)
    assert narrow.metric(line) == before + 1


def test_a_client_that_asks_for_a_tunnel_does_not_keep_the_others_waiting(narrow: Server) -> None:
    assert exchanged(narrow, "CONNECT here:80 HTTP/1.1\r\nhost: here\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert narrow.get("/health").status_code == 200


def test_fields_behind_a_body_are_no_headers(narrow: Server) -> None:
    body = json.dumps(TENSORS)
    head = HEAD.replace("/v1/rank", "/v2/models/tiny-bundle/infer") + "transfer-encoding: chunked\r\n"
    chunks = f"{len(body):x}\r\n{body}\r\n0\r\ninference-header-content-length: 3\r\n\r\n"
    assert exchanged(narrow, f"{head}connection: close\r\n\r\n{chunks}").startswith(b"HTTP/1.1 200 ")


def test_far_too_many_connections_are_closed_without_a_word(narrow: Server) -> None:
    """A connection that gets a refusal stays open for a while, so the number of these is limited as well."""
    with contextlib.ExitStack() as stack:
        for _ in range(50 + 64 + 1):
            last = stack.enter_context(narrow.connect())
        last.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert last.recv(65536) == b""
    narrow.wait_until(lambda: narrow.get("/health").status_code == 200)


@pytest.mark.slow
def test_a_request_may_take_longer_than_a_connection_may_be_idle(bundle: Path) -> None:
    """The time that runs when an answer is sent ends when the next request begins."""

    def slowly() -> Iterator[bytes]:
        yield BODY[:10].encode()
        time.sleep(1.5)
        yield BODY[10:].encode()

    with serving("--bundle", str(bundle), "--idle-seconds", "1") as server:
        place = httpx.URL(server.url)
        connection = http.client.HTTPConnection(place.host, place.port, timeout=SECONDS)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"alive"}'
        connection.request("POST", "/v1/rank", body=slowly(), headers={"content-length": str(len(BODY))})
        assert connection.getresponse().status == 200
        connection.close()


def pipelined_and_never_read(server: Server) -> socket.socket:
    """Ask for far more than a socket holds, and read none of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((httpx.URL(server.url).host, httpx.URL(server.url).port))
    for _ in range(3):  # the system holds the answers to more than one of these
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: here\r\n\r\n" * 60)
        time.sleep(0.15)
    return connection


@pytest.mark.slow
def test_a_client_that_does_not_read_is_given_up(narrow: Server) -> None:
    line = 'cappy_requests_total{route="/openapi.json",status="200"}'
    with pipelined_and_never_read(narrow) as connection:
        time.sleep(0.8)
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(MEGABYTE):
                pass
    assert narrow.metric(line) < 180


@pytest.mark.slow
def test_a_client_that_does_not_read_leaves_no_tracebacks_at_the_end(bundle: Path) -> None:
    with (
        serving("--bundle", str(bundle), "--drain-seconds", "0.2") as server,
        pipelined_and_never_read(server),
    ):
        server.stop(signal.SIGTERM)
        assert "Traceback" not in server.log
