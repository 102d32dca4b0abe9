"""Spans go to an OpenTelemetry collector: one for each request and its stages, below the client's own span."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cappy_engine import __version__
from cappy_engine.scored import Scored
from cappy_engine.serving.requests import ScoringResult, ServedModel, Stages
from cappy_engine.serving.tracing import Tracer
from tests.support.servers import faulty, pairs_of, serving, started

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.bodies: list[bytes] = []

    def resource_spans(self) -> list[ResourceSpans]:
        """List the spans that were sent, by what sent them."""
        exported = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [found for each in exported for found in each.resource_spans]


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


@pytest.mark.slow
def test_a_request_is_a_span_with_its_stages(bundle: Path, collector: Collector) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
    with serving("--bundle", str(bundle), "--tracing", variables=variables) as server:
        texts = [("a secret", "Yes"), ("a secret", "word " * 800)]
        began = time.time_ns()
        answer = server.post("/v1/score", pairs_of(*texts), traceparent=f"00-{TRACE}-{PARENT}-01")
        server.post("/v1/score", {})
        server.post("/v2/models/secret/infer", {})
        assert server.stop() == 0  # what was not sent is sent then
    spans = [span for found in collector.resource_spans() for scope in found.scope_spans for span in scope.spans]
    scored = next(span for span in spans if span.parent_span_id.hex() == PARENT)
    assert (scored.name, scored.trace_id.hex()) == ("POST /v1/score", TRACE)
    assert scored.kind == Span.SPAN_KIND_SERVER
    assert {item.key: item.value.string_value or item.value.int_value for item in scored.attributes} == {
        "http.request.method": "POST",
        "http.route": "/v1/score",
        "http.response.status_code": 200,
        "cappy.pairs": 2,
        "cappy.tokens": answer.json()["tokens"],
        "cappy.truncated": 1,
        "cappy.precision": "fp32",
    }
    stages = [span for span in spans if span.parent_span_id == scored.span_id]
    assert [span.name for span in stages] == ["tokenize", "queue", "score"]
    for stage in stages:
        milliseconds = (stage.end_time_unix_nano - stage.start_time_unix_nano) / 1e6
        assert milliseconds == pytest.approx(float(answer.headers[f"x-cappy-{stage.name}-ms"]), abs=0.001)
    assert began <= scored.start_time_unix_nano <= stages[0].start_time_unix_nano
    assert stages[2].end_time_unix_nano <= scored.end_time_unix_nano <= time.time_ns()
    assert stages[0].end_time_unix_nano == stages[1].start_time_unix_nano
    refused = [span for span in spans if span.name == "POST /v1/score" and span is not scored]
    assert [item.value.int_value for item in refused[0].attributes if item.key.endswith("status_code")] == [422]
    assert "POST /v2/models/{name}/infer" in [span.name for span in spans]
    assert not any(b"secret" in body for body in collector.bodies)
    scopes = [each.scope for found in collector.resource_spans() for each in found.scope_spans]
    assert {(scope.name, scope.version) for scope in scopes} == {("cappy_engine.serving", __version__)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("OTEL_PROPAGATORS", "tracecontext,b3", "Propagator b3 not found"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT must be a non-negative integer"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "100000", "max_export_batch_size must be less than"),
    ],
)
def test_a_variable_that_opentelemetry_does_not_take_is_told_in_a_line(
    bundle: Path, variable: str, value: str, part: str
) -> None:
    with started(["--bundle", str(bundle), "--tracing"], variables={variable: value}) as server:
        assert server.wait() == 1
    assert server.log.startswith("cappy serve: tracing cannot begin: ")
    assert part in server.log
    assert server.log.endswith("; correct the variables OTEL_...\n")


@pytest.mark.slow
def test_a_request_whose_client_went_away_is_a_span_too(bundle: Path, collector: Collector, tmp_path: Path) -> None:
    """It is the one of which its operator wants to know where the time went."""
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
    (tmp_path / "trigger").touch()
    options = "--threads 1 --step-tokens 16 --tracing".split()
    slow = faulty("slow", tmp_path / "trigger")
    with serving("--bundle", str(bundle), *options, variables=variables, command=slow) as server:
        body = json.dumps(pairs_of(*[("a", str(number)) for number in range(60)]))
        head = f"POST /v1/score HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n"
        with server.connect() as connection:
            connection.sendall((head + body).encode())
            server.wait_until(lambda: server.metric("cappy_queue_pairs") > 0)
        server.wait_until(lambda: server.metric("cappy_abandoned_requests_total") == 1)
        assert server.stop() == 0
    spans = [span for found in collector.resource_spans() for scope in found.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["POST /v1/score"]
    assert [item.value.int_value for item in spans[0].attributes if item.key.endswith("status_code")] == [499]


@pytest.mark.parametrize(("status", "is_error"), [(200, False), (422, False), (429, False), (500, True), (503, True)])
def test_a_span_is_an_error_where_the_server_is_at_fault(status: int, is_error: bool) -> None:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    Tracer(provider).trace("/v1/score", {}, status, 0.5, None)
    (span,) = kept.get_finished_spans()
    assert (span.status.status_code.name == "ERROR", span.parent) == (is_error, None)
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 500_000_000


def test_of_headers_only_the_clients_span_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """What else a client sends would come into the log, even of one that has no key."""
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "baggage": "hello secret words, =, a  b"}
    Tracer(provider).trace("/v1/score", headers, 401, 0.1, None)
    (span,) = kept.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x} {span.parent.span_id:016x}" == f"{TRACE} {PARENT}"
    assert not caplog.records


def test_the_stages_stand_at_the_end_of_a_request_whose_body_came_slowly() -> None:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    scored = Scored(np.ones(1, np.float32), np.ones(1, np.int64), np.zeros(1, np.bool_), ())
    stages = Stages(tokenize=0.1, queue=0.2, score=0.3, total=0.6)
    result = ScoringResult(scored, ServedModel(("tiny",), "cpu", "fp32", 512), "1", 0, stages=stages)
    Tracer(provider).trace("/v1/score", {}, 200, 2.0, result)
    *_, last, whole = kept.get_finished_spans()
    assert (last.name, whole.name) == ("score", "POST /v1/score")
    assert last.end_time == whole.end_time


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "cappy"),
        ({"OTEL_SERVICE_NAME": "cappy-blue"}, "cappy-blue"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=cappy-blue,service.namespace=shop"}, "cappy-blue"),
    ],
)
def test_spans_have_the_name_of_the_service_that_the_variables_say(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    tracer = Tracer()
    tracer.trace("/v1/score", {}, 200, 0.5, None)
    tracer.close()
    (found,) = collector.resource_spans()
    attributes = {item.key: item.value.string_value for item in found.resource.attributes}
    assert attributes["service.name"] == name
    assert attributes.get("service.namespace", "shop") == "shop"
