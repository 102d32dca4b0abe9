"""A replica answers as the server does, and a deployment asks Ray for what it needs. No Ray runs here."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from cappy_engine.errors import InvalidPair, ModelBroken, ScoringError, ServingError
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.http import endpoint
from cappy_engine.serving.http.ray_serve import Replica, ReplicaOptions, make_deployment
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from cappy_engine.serving.tracing import Tracer
from tests.support.servers import pairs_of

TEXTS = [("Is the sky blue?", "Yes"), ("Is the sky blue?", "No"), ("Is the sky blue?", "Perhaps, at times")]
KEY = "the-only-key-there-is"
OPTIONS = ScorerOptions(precision="int8", device="cpu", threads=1)


def made(bundle: Path, server: ServerOptions | None = None) -> Replica:
    """Make a replica, as Ray does."""
    return Replica(BundleOfNodes.of(bundle, OPTIONS), server or ServerOptions())


def posted(replica: Replica, document: object, *, is_gone: bool = False, **headers: str) -> Response:
    """Post a document to /v1/score, as Ray's proxy hands it over."""
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": lines, "query_string": b""}
    whole: Message = {"type": "http.request", "body": json.dumps(document).encode()}

    async def run() -> Response:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.disconnect"} if is_gone else whole)
        return await replica(Request(scope, messages.get))

    return asyncio.run(run())


def test_a_replica_answers_as_the_server_does(bundle: Path) -> None:
    replica = made(bundle)
    with Scorer.open_with(bundle, OPTIONS) as scorer:
        expected = scorer.score(TEXTS).tolist()
    answer = posted(replica, pairs_of(*TEXTS), x_request_id="mine")
    assert answer.status_code == 200
    assert [row["score"] for row in json.loads(bytes(answer.body))["results"]] == expected
    assert (answer.headers["x-request-id"], answer.headers["content-type"]) == ("mine", "application/json")
    assert int(answer.headers["x-cappy-tokens"]) > 0
    assert asyncio.run(replica.score(TEXTS)) == expected
    assert posted(replica, {"pairs": []}).status_code == 422


def test_a_replica_asks_for_keys_and_does_not_start_without_those_that_it_should_have(
    bundle: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    with pytest.raises(ServingError, match="cannot be read"):
        made(bundle, ServerOptions(api_key_file=keys))
    keys.write_text(KEY)
    replica = made(bundle, ServerOptions(api_key_file=keys))
    assert posted(replica, pairs_of(*TEXTS)).status_code == 401
    assert posted(replica, pairs_of(*TEXTS), x_api_key=KEY).status_code == 200


def test_a_client_that_hangs_up_is_not_an_error_of_the_replica(bundle: Path) -> None:
    assert posted(made(bundle), pairs_of(*TEXTS), is_gone=True).status_code == 499


def test_a_replica_sends_spans_where_that_was_asked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(endpoint, "Tracer", lambda: Tracer(provider))
    assert posted(made(bundle, ServerOptions(tracing=True)), pairs_of(*TEXTS)).status_code == 200
    assert "POST /v1/score" in [span.name for span in kept.get_finished_spans()]


def test_a_replica_that_ray_drops_frees_its_model_and_sends_its_last_spans(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, provider, opened = InMemorySpanExporter(), TracerProvider(), list[Scorer]()
    provider.add_span_processor(BatchSpanProcessor(kept, schedule_delay_millis=3_600_000))
    open_with = Scorer.open_with

    def open_noted(bundle: str | Path, options: ScorerOptions) -> Scorer:
        opened.append(open_with(bundle, options))
        return opened[-1]

    monkeypatch.setattr(endpoint, "Tracer", lambda: Tracer(provider))
    monkeypatch.setattr(Scorer, "open_with", open_noted)
    replica = made(bundle, ServerOptions(tracing=True))
    assert posted(replica, pairs_of(*TEXTS)).status_code == 200
    assert kept.get_finished_spans() == ()
    del replica
    gc.collect()
    assert "POST /v1/score" in [span.name for span in kept.get_finished_spans()]
    with pytest.raises(ScoringError, match="closed"):
        opened[0].score(TEXTS)


def test_a_caller_within_ray_may_send_as_long_texts_as_one_over_http(bundle: Path) -> None:
    pairs = [("Is the sky blue?", "Yes, " * 250_000)]
    with pytest.raises(InvalidPair, match="has 1250000 characters, and max_text_chars is 1000000"):
        asyncio.run(made(bundle).score(pairs))
    longer = replace(OPTIONS, max_text_chars=2_000_000)
    with Scorer.open_with(bundle, longer) as scorer:
        expected = scorer.score(pairs).tolist()
    assert asyncio.run(Replica(BundleOfNodes.of(bundle, longer), ServerOptions()).score(pairs)) == expected


def test_a_replica_is_healthy_until_its_model_is_broken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = made(bundle)
    replica.check_health()
    monkeypatch.setattr(Service, "state", "broken")
    with pytest.raises(ModelBroken):
        replica.check_health()


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Give a function that makes a deployment, and tells what Ray was asked for."""

    def deploy(*arguments: Any, **options: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def deployment(**wanted: Any) -> Callable[[type], Any]:
            asked.update(wanted)
            return lambda kind: types.SimpleNamespace(bind=lambda *bound: asked.update(kind=kind, bound=bound))

        module: Any = types.ModuleType("ray")
        module.serve = types.SimpleNamespace(deployment=deployment)
        monkeypatch.setitem(sys.modules, "ray", module)
        make_deployment(*arguments, **options)
        return asked

    return deploy


def test_a_deployment_asks_for_what_its_replicas_need(bundle: Path, deployed: Callable[..., dict[str, Any]]) -> None:
    server = ServerOptions(drain_seconds=7)
    replicas = ReplicaOptions(2, 8, cores=3, target_requests=10, max_requests=20, max_waiting=30)
    asked = deployed(bundle, options=ScorerOptions(device="cuda"), server=server, replicas=replicas, name="mine")
    assert (asked["name"], asked["kind"], asked["bound"][1]) == ("mine", Replica, server)
    assert (asked["max_ongoing_requests"], asked["max_queued_requests"]) == (20, 30)
    scaling = asked["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 8, 10)
    assert asked["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 1}
    assert asked["graceful_shutdown_timeout_s"] == 7
    assert asked["bound"][0].options == ScorerOptions(device="cuda", threads=3)


def test_a_deployment_without_options_is_for_cpus(deployed: Callable[..., dict[str, Any]]) -> None:
    asked = deployed(replicas=ReplicaOptions(cores=2))
    assert asked["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}
    assert (asked["bound"][0].options.device, asked["bound"][0].options.threads) == ("cpu", 2)


def test_device_auto_is_the_cpu_and_threads_are_cores(deployed: Callable[..., dict[str, Any]]) -> None:
    asked = deployed(options=ScorerOptions(precision="int8", threads=3))
    assert asked["ray_actor_options"] == {"num_cpus": 3, "num_gpus": 0}
    assert asked["bound"][0].options == ScorerOptions(precision="int8", device="cpu", threads=3)
    with pytest.raises(ValueError, match="threads 3 is more than the cores of a replica, 2"):
        deployed(options=ScorerOptions(threads=3), replicas=ReplicaOptions(cores=2))


def test_gpus_by_number_are_refused(deployed: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="gpus cannot be chosen by number on a cluster"):
        deployed(options=ScorerOptions(device="cuda", gpus=(0,)))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"min_replicas": 0}, "min_replicas"),
        ({"cores": 0}, "cores"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is more than max_replicas 2"),
        ({"target_requests": 300}, "target_requests 300 is more than max_requests 256"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ReplicaOptions(**wrong)
