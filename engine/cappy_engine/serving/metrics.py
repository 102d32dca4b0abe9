"""Count what the server does, for Prometheus. No text of a request is ever in it, only counts and times."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from cappy_engine import __version__
from cappy_engine.options import ScorerInfo
from cappy_engine.serving.jobs import Step
from cappy_engine.serving.requests import ScoringResult, ServedModel
from cappy_engine.serving.statuses import ERROR_TYPES

CONTENT_TYPE = CONTENT_TYPE_LATEST
NO_ROUTE = "other"
"""The route of what no path answers."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536, 262144)
"""The last bound is a step of 128 cores, or of 4 GPUs, by default."""


class Metrics:
    """The server's counters, in a registry of their own.

    >>> metrics = Metrics()
    >>> metrics.refused("overloaded")
    >>> b'cappy_refused_requests_total{reason="overloaded"} 1.0' in metrics.page()
    True
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = self._counter("requests", "requests answered", "route", "status")
        self._refused = self._counter("refused_requests", "requests that were not scored", "reason")
        self._abandoned = self._counter("abandoned_requests", "requests whose client went away before the answer")
        self._stages = self._histogram("stage_seconds", "time of a request in a stage", SECONDS, "stage")
        self._steps = self._histogram("step_tokens", "tokens of a run of the model", TOKENS, "device", "precision")
        self._pairs = self._counter("pairs", "pairs scored", "device", "precision")
        self._tokens = self._counter("tokens", "tokens of the pairs scored", "device", "precision")
        self._computed = self._counter(
            "computed_tokens", "tokens that the model computed, padding included", "device", "precision"
        )
        self._busy = self._counter(
            "busy_seconds", "time of the model's runs, each times its share of the workers", "device", "precision"
        )
        self._truncated = self._counter("truncated_pairs", "pairs that were too long for the model")
        self._swaps = self._counter("swaps", "bundles opened again", "result")
        for result in ("done", "failed"):  # from 0 on, so that the first one is seen as a rise
            self._swaps.labels(result)
        for reason in set(ERROR_TYPES.values()):
            self._refused.labels(reason)
        labels = ("model", "manifest_sha256", "device", "precision", "version")
        self._model = Gauge("cappy_model_info", "the model that answers", labels, registry=self._registry)

    def page(self) -> bytes:
        """Write the metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def serves(self, device: str, precision: str) -> None:
        """Begin to count for a model. So its counters are there before its first run."""
        for counter in (self._pairs, self._tokens, self._computed, self._busy):
            counter.labels(device, precision)

    def answers_with(self, model: ServedModel, manifest_sha256: str) -> None:
        """Name the model that answers from now on, and no other."""
        self._model.clear()
        self._model.labels(model.name, manifest_sha256, model.device, model.precision, __version__).set(1)

    def watch(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Ask `read` for the value of a gauge, whenever the page is written."""
        Gauge(f"cappy_{name}", help, registry=self._registry).set_function(read)

    def answered(self, route: str, status: int) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()

    def refused(self, reason: str) -> None:
        """Count a request that was refused; `reason` is the `error_type` of the answer."""
        self._refused.labels(reason).inc()

    def abandoned(self) -> None:
        """Count a request whose client went away."""
        self._abandoned.inc()

    def scored(self, result: ScoringResult) -> None:
        """Count the time of a request in each stage, and its truncated pairs."""
        for stage, seconds in result.stages.items():
            self._stages.labels(stage).observe(seconds)
        if truncated := result.truncated:
            self._truncated.inc(truncated)

    def swapped(self, result: str) -> None:
        """Count a bundle that was opened again: "done" or "failed"."""
        self._swaps.labels(result).inc()

    def stepped(self, step: Step, info: ScorerInfo, computed_tokens: int) -> None:
        """Count a run of the model."""
        kind = (info.device, info.precision if step.model == "chosen" else "fp32")
        tokens = int(step.lengths.sum())
        self._steps.labels(*kind).observe(tokens)
        self._pairs.labels(*kind).inc(len(step.lengths))
        self._tokens.labels(*kind).inc(tokens)
        self._computed.labels(*kind).inc(computed_tokens)
        self._busy.labels(*kind).inc(step.seconds * step.workers)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"cappy_{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"cappy_{name}", help, labels, buckets=buckets, registry=self._registry)
