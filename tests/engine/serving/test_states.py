"""What a server answers before its model is there, and when something of ours fails."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cappy_engine.errors import ScoringError
from cappy_engine.options import Precision, ScorerOptions
from cappy_engine.serving.http.app import make_app
from cappy_engine.serving.http.endpoint import Gate
from cappy_engine.serving.logs import JsonLines, TextLines
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.requests import ScoringRequest, ScoringResult
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from tests.support.servers import pairs_of

ONE = pairs_of(("a secret", "Yes"))


@pytest.fixture
def service(bundle: Path) -> Iterator[Service]:
    """Give a service whose model is not loaded."""
    made = Service(bundle, ScorerOptions(), ServerOptions(), metrics=Metrics())
    yield made
    made.close()


def answered(service: Service, ask: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Ask the application of a service."""

    async def run() -> Any:
        app = make_app(Gate(service, ServerOptions(), keys=None))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await ask(client)

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/score", "/rerank", "/v2/models/tiny/infer"])
def test_who_asks_before_the_model_is_there_hears_to_come_again(service: Service, path: str) -> None:
    refused = answered(service, lambda client: client.post(path, json=ONE))
    assert (refused.status_code, refused.json()["error_type"]) == (503, "unhealthy")
    assert "still being loaded" in refused.json()["error"]
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/health", 200, {"status": "alive"}),
        ("/ready", 503, {"status": "loading"}),
        ("/v2/health/live", 200, {"live": True}),
        ("/v2/health/ready", 503, {"ready": False}),
        ("/v2/models/tiny/ready", 503, {"name": "tiny", "ready": False}),
    ],
)
def test_a_server_that_loads_is_alive_and_not_ready_and_refuses_no_probe(
    service: Service, path: str, status: int, answer: dict[str, object]
) -> None:
    found = answered(service, lambda client: client.get(path))
    assert (found.status_code, found.json()) == (status, answer)
    page = service.metrics.page().decode()
    assert "\ncappy_ready 0.0\n" in page
    assert '\ncappy_refused_requests_total{reason="unhealthy"} 0.0\n' in page


def test_a_model_is_ready_until_the_server_stops(service: Service) -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(f"/v2/models/{name}/ready") for name in ("tiny-bundle", "gpt")]

    service.load()
    ready, other = answered(service, ask)
    assert (ready.status_code, ready.json()) == (200, {"name": "tiny-bundle", "ready": True})
    assert (other.status_code, other.json()["error_type"]) == (404, "not_found")
    service.drain()
    draining, _ = answered(service, ask)
    assert (draining.status_code, draining.json()) == (503, {"name": "tiny-bundle", "ready": False})


@pytest.mark.parametrize(("precision", "is_there"), [("int8", True), ("fp32", False)])
def test_information_says_whether_there_is_an_exact_winner(bundle: Path, precision: Precision, is_there: bool) -> None:
    service = Service(bundle, ScorerOptions(precision=precision), ServerOptions(), metrics=Metrics())
    service.load()
    found = answered(service, lambda client: client.get("/info")).json()
    service.close()
    assert (found["precision"], found["exact_winner"]) == (precision, is_there)


@pytest.mark.parametrize(
    ("error", "answer"), [(ScoringError("no memory"), "no memory"), (KeyError("mistake"), "its log says why")]
)
def test_a_failure_of_ours_is_in_the_log_with_the_id_of_the_request(
    service: Service, error: Exception, answer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(request: ScoringRequest, request_id: str) -> ScoringResult:
        raise error

    service.load()
    monkeypatch.setattr(service, "score", fails)
    failed = answered(service, lambda client: client.post("/v1/score", json=ONE, headers={"x-request-id": "mine"}))
    assert (failed.status_code, failed.json()["error_type"]) == (500, "backend")
    assert answer in failed.json()["error"]
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["message"], line["request_id"]) == ("error", "a request failed", "mine")
    assert "Traceback" in line["traceback"]
    assert type(error).__name__ in line["traceback"]


def test_a_failure_of_ours_in_what_is_looked_at_is_in_the_log_too(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> bytes:
        raise KeyError("mistake")

    monkeypatch.setattr(service.metrics, "page", fails)
    failed = answered(service, lambda client: client.get("/metrics"))
    assert (failed.status_code, "its log says why" in failed.json()["error"]) == (500, True)
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "KeyError: 'mistake'" in TextLines().format(record)


def test_a_model_that_cannot_leave_keeps_the_new_one_from_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "cappy-leave":
            raise RuntimeError("can't start new thread")
        start(thread)

    service.load()
    old = service.model
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert service.load()
    assert service.model is not old
    assert caplog.messages[-1] == "the old model is not freed: can't start new thread"
    old.close(1)
    assert service.load(), "the thread that was not started is not waited for"
