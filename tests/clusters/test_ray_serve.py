"""Ray Serve answers as `cappy serve` does, by replicas that check their bundle."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from cappy_engine.scorer import Scorer
from cappy_engine.serving.http.ray_serve import ReplicaOptions, make_deployment


def free_port() -> int:
    """Find a port that nobody listens at; Ray takes none by itself."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


PORT = free_port()
PAIRS = [("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")]


@pytest.fixture(scope="module")
def handle(connection: None) -> Iterator[Any]:
    """Serve cappy-mini by one replica, on a port that is free."""
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
    yield serve.run(make_deployment(replicas=ReplicaOptions(cores=1)))
    serve.shutdown()


def post(path: str, body: object) -> tuple[int, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_deployment_scores_over_http_and_by_its_handle(handle: Any) -> None:
    with Scorer.open(threads=1) as scorer:
        expected = scorer.score(PAIRS)
    assert handle.score.remote(PAIRS).result(timeout_s=20) == pytest.approx(expected.tolist(), abs=1e-5)
    status, found = post("/predict", {"inputs": [list(pair) for pair in PAIRS], "raw_scores": True})
    assert status == 200
    assert [row[0]["score"] for row in found] == pytest.approx(expected.tolist(), abs=1e-5)
    status, found = post("/predict", {"inputs": 3})
    assert status == 422
