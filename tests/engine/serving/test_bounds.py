"""What one client does must not hurt the others: bodies, headers and connections are bounded, and so is its work."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.faulty_cappy import POISON, POISON_TOKENS
from tests.support.servers import SECONDS, Server, faulty, pairs_of, serving

SKY = "Is the sky blue?"
HEAD = "POST /v1/rank HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"
BODY = json.dumps({"instruction": SKY, "candidates": ["Yes"]})


def received(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:  # it closed while we were still sending
        pass
    return found


def test_a_body_that_announces_to_be_too_large_is_refused_unread(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(f"{HEAD}content-length: 99999999999\r\n\r\n".encode())
        assert b" 413 " in received(connection)


def test_zeros_before_an_announced_length_do_not_make_it_larger(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(f"{HEAD}connection: close\r\ncontent-length: {len(BODY):030}\r\n\r\n{BODY}".encode())
        assert b" 200 " in received(connection)


def test_a_request_may_be_as_large_as_the_limits_say(server: Server) -> None:
    most = json.dumps(pairs_of(*[(SKY, "Yes")] * 50)).ljust(100_000).encode()
    headers = {"content-type": "application/json"}
    assert server.client.post("/v1/score", content=most, headers=headers).status_code == 200
    assert server.client.post("/v1/score", content=iter([most]), headers=headers).status_code == 200  # chunked
    assert server.client.post("/v1/score", content=most + b" ", headers=headers).status_code == 413


def test_a_chunked_body_without_end_is_refused_when_it_is_too_large(server: Server) -> None:
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    with server.connect() as connection:
        connection.sendall(f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode())
        connection.sendall(chunk * 26)  # just above the limit of 100,000 bytes
        assert b" 413 " in received(connection)


@pytest.mark.slow
def test_a_body_that_comes_too_slowly_is_refused(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(f"{HEAD}content-length: {len(BODY)}\r\n\r\n{BODY[:10]}".encode())
        answer = received(connection)
        assert b" 408 " in answer
        assert b'"error_type":"timeout"' in answer


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["", "POST /v1/rank HT", HEAD], ids=["nothing", "half a line", "half a head"])
def test_a_connection_without_a_whole_head_is_closed(server: Server, sent: str) -> None:
    with server.connect() as connection:
        connection.sendall(sent.encode())
        assert received(connection) == b""


@pytest.mark.slow
def test_a_connection_stays_open_between_requests_for_longer_than_a_body_may_take(server: Server) -> None:
    address = httpx.URL(server.url)
    with contextlib.closing(http.client.HTTPConnection(address.host, address.port, timeout=SECONDS)) as connection:
        for _ in range(2):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"alive"}'
            time.sleep(0.8)  # body_seconds are 0.5, idle_seconds 75


@pytest.mark.slow
def test_half_a_head_after_an_answer_is_closed_too(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(f"{HEAD}content-length: {len(BODY)}\r\n\r\n{BODY}POST /v1/".encode())
        assert received(connection).count(b"HTTP/1.1 ") == 1


def test_requests_behind_each_other_on_a_connection_are_answered_in_order(server: Server) -> None:
    bodies = [json.dumps({"instruction": SKY, "candidates": [text]}) for text in ("first", "second", "third")]
    requests = [f"{HEAD}content-length: {len(body)}\r\n\r\n{body}" for body in bodies]
    requests[-1] = requests[-1].replace("host: here", "host: here\r\nconnection: close")
    with server.connect() as connection:
        connection.sendall("".join(requests).encode())
        answer = received(connection).decode()
    assert re.findall(r'HTTP/1.1 200 |"response":"(\w+)"', answer) == ["", "first", "", "second", "", "third"]


def test_a_thousand_idle_connections_do_not_keep_others_waiting(server: Server) -> None:
    idle: list[socket.socket] = []
    try:
        for _ in range(1000):
            idle.append(server.connect())
        assert server.post("/v1/score", pairs_of((SKY, "Yes"))).status_code == 200
    finally:
        for connection in idle:
            connection.close()


@pytest.fixture(scope="module")
def slow(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server whose model takes 0.2 s for a batch, and whose queue holds three pairs; a head may take 0.3 s."""
    trigger = tmp_path_factory.mktemp("slow") / "trigger"
    options = "--threads 1 --max-queue-pairs 3 --step-tokens 16 --request-seconds 1.5 --body-seconds 0.3 --log-requests"
    with serving("--bundle", str(bundle), *options.split(), command=faulty("slow", trigger)) as running:
        trigger.touch()
        yield running


@pytest.mark.slow
def test_what_does_not_fit_is_refused_at_once_and_says_when_to_come_again(slow: Server) -> None:
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda number: slow.post("/v1/score", pairs_of((SKY, str(number)))), range(12)))
    refused = [response for response in found if response.status_code == 429]
    assert {response.status_code for response in found} == {200, 429}
    assert all(float(each.headers["x-cappy-score-ms"]) >= 200 for each in found if each not in refused)
    assert refused[0].json()["error_type"] == "overloaded"
    assert int(refused[0].headers["retry-after"]) >= 1


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_given_up(slow: Server) -> None:
    response = slow.post("/v1/score", pairs_of(*[(SKY, str(number)) for number in range(30)]))
    assert (response.status_code, response.json()["error_type"]) == (503, "unhealthy")
    assert "not answered in 1.5 seconds" in response.json()["error"]
    assert response.headers["retry-after"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, 2], ids=["one request", "two more behind it"])
def test_the_work_of_a_client_that_hangs_up_is_not_done(slow: Server, more: int) -> None:
    labels = 'cappy_pairs_total{device="cpu",precision="fp32"}'
    before, gone = slow.metric(labels), slow.metric("cappy_abandoned_requests_total")
    body = json.dumps({"instruction": SKY, "candidates": [str(number) for number in range(40)]})
    request = f"{HEAD}content-length: {len(body)}\r\n\r\n{body}".encode()
    with slow.connect() as connection:
        connection.sendall(request)
        slow.wait_until(lambda: slow.metric("cappy_queue_pairs") > 0)
        connection.sendall(request * more)
        time.sleep(0.2)  # in which they are read; the connection is listened to all the same
    slow.wait_until(lambda: slow.metric("cappy_abandoned_requests_total") > gone)
    assert slow.wait_for_line("status=499").startswith("request route=/v1/rank status=499 request_id=")
    assert slow.post("/v1/score", pairs_of((SKY, "Yes"))).status_code == 200
    assert slow.metric(labels) - before < 10
    assert 'status="0"' not in slow.get("/metrics").text  # what nobody was told is no answer


def test_a_head_that_comes_in_parts_may_be_as_long_as_one_that_comes_at_once(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD.encode() + b"x: ")
        for _ in range(40):
            connection.sendall(b"x" * 1000)
            time.sleep(0.002)
        connection.sendall(f"\r\nconnection: close\r\ncontent-length: {len(BODY)}\r\n\r\n{BODY}".encode())
        assert b" 200 " in received(connection)


def test_half_a_head_of_many_fields_is_refused(server: Server) -> None:
    """A field without a text takes five bytes on the way, and a hundred in memory."""
    with server.connect() as connection:
        with contextlib.suppress(OSError):  # it may be refused before all is sent
            connection.sendall(HEAD.encode() + b"a:\r\n" * 12_000)
        assert b"with 176 more for each header" in received(connection)


@pytest.mark.slow
def test_heads_of_many_fields_may_not_all_wait(slow: Server) -> None:
    body = json.dumps({"instruction": SKY, "candidates": [str(number) for number in range(40)]})
    head = "GET /health HTTP/1.1\r\nhost: here\r\n" + "a:\r\n" * 300 + "\r\n"
    with slow.connect() as connection:
        connection.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}{head * 60}".encode())
        answer = received(connection)
    assert 2 <= answer.count(b'{"status":"alive"}') <= 8
    assert answer.count(b"connection: close") == 1


@pytest.mark.slow
def test_half_a_head_does_not_keep_the_request_before_it_from_its_answer(slow: Server) -> None:
    body = json.dumps({"instruction": SKY, "candidates": ["Yes", "No", "Perhaps"]})
    with slow.connect() as connection:
        connection.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n{body}POST /v1/".encode())
        assert received(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_a_pair_that_fails_in_the_model_fails_only_its_request(bundle: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with serving("--bundle", str(bundle), command=faulty(POISON, trigger)) as server:
        tokens = server.post("/v1/score", pairs_of(("", "a"))).json()["tokens"]
        poison = ("", " ".join(["a"] * (POISON_TOKENS - tokens + 1)))
        assert server.post("/v1/score", pairs_of(poison)).json()["tokens"] == POISON_TOKENS
        trigger.touch()

        def ask(number: int) -> int:
            texts = [(SKY, str(number)), poison] if number % 4 == 0 else [(SKY, str(number)), (SKY, "no")]
            return server.post("/v1/score", pairs_of(*texts)).status_code

        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(ask, range(24)))
        assert found == [422 if number % 4 == 0 else 200 for number in range(24)]
        twice = ((SKY, "Yes"), (SKY, "Yes"))  # computed once: the place is that in the request
        failed = server.post("/v1/score", pairs_of(*twice, poison)).json()
        assert (failed["pair"], "this pair is poison" in failed["error"]) == (2, True)
        assert server.get("/ready").status_code == 200
