"""Send spans of requests and of their stages to an OpenTelemetry collector.

Each request has a span, and each of its stages has one. Texts are never sent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from cappy_engine import __version__
from cappy_engine.errors import InstallationError, ServingError, install_hint
from cappy_engine.serving.requests import ScoringResult

STAGES = ("tokenize", "queue", "score")


class Tracer:
    """Makes spans of requests that ended; they go where `OTEL_EXPORTER_OTLP_ENDPOINT` says.

    A `provider` of the caller's own is used as it is. Raises InstallationError without the packages, and ServingError
    for variables that OpenTelemetry does not take.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if provider is None:
                asked = OTELResourceDetector().detect()  # by OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
                provider = TracerProvider(resource=Resource.create({"service.name": "cappy"}).merge(asked))
                provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        except ModuleNotFoundError as error:
            raise InstallationError(
                f"tracing needs the package {error.name!r}; {install_hint('serve,tracing')}"
            ) from error
        except ValueError as error:  # already an import reads variables
            raise ServingError(
                f"tracing cannot begin: {str(error).rstrip('.')}; correct the variables OTEL_..."
            ) from error
        self._provider = provider
        self._tracer = provider.get_tracer("cappy_engine.serving", __version__)
        self._trace = trace
        # OpenTelemetry's default reads `baggage`, too, and logs what is wrong in it
        self._parents = propagate if os.environ.get("OTEL_PROPAGATORS") else TraceContextTextMapPropagator()

    def trace(
        self, route: str, headers: Mapping[str, str], status: int, seconds: float, result: ScoringResult | None
    ) -> None:
        """Make the span of a request that took `seconds` and ends now.

        It is below the client's own span, which the header `traceparent` names.
        """
        parent = self._parents.extract(headers)
        end = time.time_ns()
        start = end - round(seconds * 1e9)
        attributes: dict[str, Any] = {"http.request.method": "POST", "http.route": route}
        attributes["http.response.status_code"] = status
        if result is not None:
            attributes["cappy.pairs"] = len(result.scored.scores)
            attributes["cappy.tokens"] = result.tokens
            attributes["cappy.truncated"] = result.truncated
            attributes["cappy.precision"] = result.model.precision
        kind = self._trace.SpanKind.SERVER
        span = self._tracer.start_span(f"POST {route}", parent, kind=kind, attributes=attributes, start_time=start)
        if status >= 500:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR))
        if result is not None:
            inside = self._trace.set_span_in_context(span)
            at = end - round(result.stages.total * 1e9)
            stages = dict(result.stages.items())
            for stage in STAGES:
                until = at + round(stages[stage] * 1e9)
                self._tracer.start_span(stage, inside, start_time=at).end(until)
                at = until
        span.end(end)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._provider.shutdown()
