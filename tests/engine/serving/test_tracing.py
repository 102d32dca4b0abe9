"""Spans go to an OpenTelemetry collector: one for each request and its stages, below the client's own span."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.servers import pairs_of, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.bodies: list[bytes] = []


class Receiver(BaseHTTPRequestHandler):
    """Takes what an exporter posts."""

    server: Collector

    def do_POST(self) -> None:
        """Keep a body."""
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_request_is_a_span_with_its_stages(bundle: Path, collector: Collector) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
    with serving("--bundle", str(bundle), "--tracing", variables=variables) as server:
        server.post("/v1/score", pairs_of(("a secret", "Yes")), traceparent=f"00-{TRACE}-{PARENT}-01")
        server.post("/v1/score", {})
        assert server.stop() == 0  # what was not sent is sent then
    exported = [ExportTraceServiceRequest.FromString(body) for body in collector.bodies]
    spans = [
        span
        for each in exported
        for found in each.resource_spans
        for scope in found.scope_spans
        for span in scope.spans
    ]
    scored = next(span for span in spans if span.parent_span_id.hex() == PARENT)
    assert (scored.name, scored.trace_id.hex()) == ("POST /v1/score", TRACE)
    attributes = {item.key: item.value.int_value for item in scored.attributes}
    assert (attributes["http.response.status_code"], attributes["cappy.pairs"]) == (200, 1)
    stages = [span for span in spans if span.parent_span_id == scored.span_id]
    assert [span.name for span in stages] == ["tokenize", "queue", "score"]
    assert stages[0].end_time_unix_nano == stages[1].start_time_unix_nano
    refused = [span for span in spans if span.name == "POST /v1/score" and span is not scored]
    assert [item.value.int_value for item in refused[0].attributes if item.key.endswith("status_code")] == [422]
    assert not any(b"secret" in body for body in collector.bodies)
