"""Serve a bundle by Ray Serve: replicas of the server's core, each with its own queue and dynamic batching.

A replica answers the paths of `cappy serve`, and asks for API keys; Ray listens, spreads requests and starts replicas.
Ray is imported when a function is called.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from cappy_engine.bundle import EMBEDDED
from cappy_engine.checks import check_count
from cappy_engine.cpu.cores import usable_cores
from cappy_engine.errors import InstallationError, ModelBroken, install_hint
from cappy_engine.nodes import BundleOfNodes
from cappy_engine.options import ScorerOptions
from cappy_engine.pairs import check_pairs
from cappy_engine.serving.http.app import make_app
from cappy_engine.serving.http.endpoint import CLIENT_GONE, Gate
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.requests import ScoringRequest
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas run, what each one has, and how busy it should be.

    >>> ReplicaOptions(min_replicas=2, max_replicas=16, cores=4)

    A replica batches what waits in it. So it needs many requests at once: with Ray's default, 5, its batches would stay
    small. Replicas are added where more than `target_requests` are at work in each, and removed where fewer are for ten
    minutes, since a model takes a while to load. More than `max_requests` wait in Ray's proxies. Raises ValueError.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cores: int | None = None
    target_requests: int = 32
    max_requests: int = 256
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        for name in ("min_replicas", "max_replicas", "target_requests", "max_requests", "max_waiting"):
            check_count(name, getattr(self, name))
        if self.cores is not None:
            check_count("cores", self.cores)
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        if self.target_requests > self.max_requests:
            raise ValueError(f"target_requests {self.target_requests} is more than max_requests {self.max_requests}")


class Replica:
    """One replica: the service of `cappy serve`, and its application. Ray makes and calls it."""

    def __init__(self, bundle: BundleOfNodes, server: ServerOptions) -> None:
        self._max_text_chars = bundle.options.max_text_chars
        self._service = Service(bundle.find(), bundle.options, server, metrics=Metrics())
        self._gate = Gate.of(self._service, server)
        self._service.load()
        self._app = make_app(self._gate)

    async def __call__(self, request: Request) -> Response:
        """Answer a request over HTTP, as `cappy serve` does."""
        sent: list[Message] = []

        async def keep(message: Message) -> None:
            sent.append(message)

        await self._app(request.scope, request.receive, keep)
        if not sent:
            return Response(status_code=CLIENT_GONE)
        response = Response(b"".join(message.get("body", b"") for message in sent[1:]), sent[0]["status"])
        response.raw_headers = list(sent[0].get("headers", []))
        return response

    async def score(self, pairs: Any) -> list[float]:
        """Score pairs for a caller within Ray: `handle.score.remote([("Is the sky blue?", "Yes")])`."""
        request = ScoringRequest(check_pairs(pairs, max_text_chars=self._max_text_chars), lambda result: result)
        result = await self._service.score(request, "ray")
        return [float(score) for score in result.scored.scores]

    def check_health(self) -> None:
        """Raise ModelBroken where the model gives no right scores any more: then Ray replaces the replica."""
        if self._service.state == "broken":
            raise ModelBroken("the model of this replica is broken")

    def __del__(self) -> None:
        """Answer what was accepted, and free the model."""
        gate: Gate | None = getattr(self, "_gate", None)
        if gate is not None:
            gate.service.close(1.0)
            if gate.tracer is not None:
                gate.tracer.close()


def make_deployment(
    bundle: str | Path = EMBEDDED,
    *,
    options: ScorerOptions | None = None,
    server: ServerOptions | None = None,
    replicas: ReplicaOptions | None = None,
    name: str = "cappy",
) -> Any:
    """Make a Ray Serve application of a bundle. The bundle must lie at the same path on every node.

        >>> ray.serve.run(make_deployment("/models/cappy-bundle", replicas=ReplicaOptions(max_replicas=8)))

    Ray decides on host, port, sockets, connections and the format of the log, whatever `server` says of them. Each
    replica checks the bundle's digest and its canary before it answers. Device "auto" is the CPU here. A replica has
    `replicas.cores` cores; without them `options.threads`, or as many as this machine has, at most 8. Raises
    BundleError, InstallationError, and ValueError for GPUs by number, and for more threads than cores.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise InstallationError(f"Ray Serve needs the package 'ray'; {install_hint('cpu,serve,ray')}") from error
    options, replicas = options or ScorerOptions(device="cpu"), replicas or ReplicaOptions()
    if options.gpus is not None:
        raise ValueError("gpus cannot be chosen by number on a cluster: Ray gives one to each replica")
    if options.device == "auto":
        options = replace(options, device="cpu")
    cores = replicas.cores or options.threads or min(usable_cores(), 8)
    threads = options.threads or cores
    if threads > cores:
        raise ValueError(f"threads {threads} is more than the cores of a replica, {cores}; ask for as many cores")
    nodes = BundleOfNodes.of(bundle, replace(options, threads=threads))
    server = server or ServerOptions()
    deploy = partial(
        serve.deployment,
        name=name,
        max_ongoing_requests=replicas.max_requests,
        max_queued_requests=replicas.max_waiting,
        autoscaling_config={
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.target_requests,
            "upscale_delay_s": 10,
            "downscale_delay_s": 600,
        },
        ray_actor_options={"num_cpus": cores, "num_gpus": int(options.device in ("cuda", "tensorrt"))},
        graceful_shutdown_timeout_s=server.drain_seconds,
        health_check_period_s=10,
    )
    return deploy()(Replica).bind(nodes, server)
