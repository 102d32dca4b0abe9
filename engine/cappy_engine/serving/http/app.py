"""Put the server's paths together, as an ASGI application."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.routing import Route as Path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cappy_engine import __version__
from cappy_engine.errors import NotReady
from cappy_engine.serving.assets import Asset, read_assets
from cappy_engine.serving.dialects.kserve import ModelReady, ServerReady, describe_model, describe_server
from cappy_engine.serving.dialects.routes import ROUTES
from cappy_engine.serving.http.endpoint import Gate, ScoringEndpoint, encoded, failure_reply
from cappy_engine.serving.metrics import CONTENT_TYPE, NO_ROUTE, Metrics
from cappy_engine.serving.openapi import PROBES, describe
from cappy_engine.serving.service import Service
from cappy_engine.serving.statuses import Failure, failure_of

Answer = Callable[[Request], Awaitable[Response]]

log = logging.getLogger("cappy.server")


def make_app(gate: Gate) -> ASGIApp:
    """Make the application that answers all paths, and counts the answers.

    >>> app = make_app(Gate(service, ServerOptions(), keys=None))
    """
    service = gate.service
    description = msgspec.json.encode(describe(ROUTES, __version__, needs_key=gate.keys is not None))
    pages: list[BaseRoute] = [Path(path, partial(_show, asset)) for path, asset in read_assets().items()]
    posts: list[BaseRoute] = [
        Path(_pattern(route.path), ScoringEndpoint(route, gate), methods=["POST"]) for route in ROUTES
    ]
    reads: dict[str, Callable[[Request], Any]] = {
        "/health": lambda request: {"status": "alive"},
        "/ready": partial(_ready, service),
        "/v2/health/live": lambda request: {"live": True},
        "/v2/health/ready": lambda request: _json(ServerReady(service.state == "ready"), _ready_status(service)),
        "/info": partial(_info, gate),
        "/openapi.json": lambda request: Response(description, media_type="application/json"),
        "/metrics": lambda request: Response(service.metrics.page(), media_type=CONTENT_TYPE),
        "/v2": lambda request: describe_server(__version__),
        "/v2/models/{name}": partial(_kserve_model, service),
        "/v2/models/{name}/ready": partial(_kserve_ready, service),
    }
    gets = [Path(_pattern(path), _answer(gate, read, needs_key=path not in PROBES)) for path, read in reads.items()]
    app = Starlette(
        routes=[*posts, *gets, *pages],
        exception_handlers={HTTPException: partial(_http_error, service.metrics), Exception: _server_error},
    )
    app.router.redirect_slashes = False
    return _counted(app, service.metrics)


class _ModelName(Convertor[str]):
    """The name of a model within a path, which may have slashes, as org/model has: some clients encode them."""

    regex = "(?:(?!/versions/|/(?:infer|ready)$).)+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("model", _ModelName())


def _pattern(path: str) -> str:
    return path.replace("{name}", "{name:model}")


def _counted(app: Starlette, metrics: Metrics) -> ASGIApp:
    """Count every answer by the path of its route, never by the requested path. Anybody can make up paths.

    Requests for scores go to their endpoint at once: Starlette tries the routes one after the other.
    """
    paths: dict[object, str] = {route.endpoint: route.path_format for route in app.routes if isinstance(route, Path)}
    posts = {path: endpoint for endpoint, path in paths.items() if isinstance(endpoint, ScoringEndpoint)}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        at_once = posts.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if at_once is not None:
            scope["endpoint"] = at_once
        await (at_once or app)(scope, receive, send_on)
        if status:
            metrics.answered(paths.get(scope.get("endpoint"), NO_ROUTE), status)

    return answer


def _answer(gate: Gate, read: Callable[[Request], Any], *, needs_key: bool) -> Answer:
    """Make an endpoint of a function that reads what is asked for."""

    async def answer(request: Request) -> Response:
        try:
            if needs_key:
                gate.check_key(request.headers)
            found = read(request)
        except Exception as error:
            if (failure := failure_of(error)).status == 500:
                log.exception("a request failed")
            gate.service.metrics.refused(failure.error_type)
            return _failed(failure)
        response = found if isinstance(found, Response) else _json(found)
        if gate.is_closing:
            response.headers["connection"] = "close"
        return response

    return answer


def _ready(service: Service, request: Request) -> Any:
    return _json({"status": service.state}, _ready_status(service))


def _ready_status(service: Service) -> int:
    return 200 if service.state == "ready" else 503


def _info(gate: Gate, request: Request) -> dict[str, Any]:
    model, options = gate.service.model, gate.options
    info, limits = model.scorer.info, model.queue.limits
    return {
        "model": model.card.name,
        "names": list(model.card.names),
        "version": __version__,
        "bundle": model.place,
        "manifest_sha256": model.manifest_sha256,
        **{
            name: getattr(info, name)
            for name in (
                "device device_reason precision precision_reason threads mode mode_reason padding max_batch_tokens "
                "max_length"
            ).split()
        },
        "exact_winner": model.has_exact_winner,
        "limits": {
            "max_body_bytes": options.max_body_bytes,
            "max_pairs": options.max_pairs,
            "max_text_chars": model.max_text_chars,
            "max_queue_pairs": limits.max_pairs,
            "max_queue_tokens": limits.max_tokens,
            "request_seconds": options.request_seconds,
        },
    }


def _kserve_model(service: Service, request: Request) -> Any:
    card = service.model.card
    card.check_name(request.path_params["name"])
    return describe_model(card)


def _kserve_ready(service: Service, request: Request) -> Any:
    """Answer a probe: before a model is there, any name is not ready, and no request is refused."""
    asked = request.path_params["name"]
    try:
        card = service.model.card
    except NotReady:
        return _json(ModelReady(asked, ready=False), 503)
    card.check_name(asked)
    return _json(ModelReady(card.name, service.state == "ready"), _ready_status(service))


async def _show(asset: Asset, request: Request) -> Response:
    headers = dict(asset.headers)
    if request.headers.get("if-none-match") == headers.get("etag"):
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers)


async def _http_error(metrics: Metrics, request: Request, error: Exception) -> Response:
    """Answer what no path answers."""
    status = getattr(error, "status_code", 500)
    headers = getattr(error, "headers", None) or {}
    path = request.url.path[:100]
    message = {
        404: f"there is nothing at {path!r}; /docs lists the paths",
        405: f"{path!r} takes {headers.get('Allow', 'other methods')}, not {request.method[:20]}",
    }.get(status, getattr(error, "detail", "this request cannot be answered"))
    failure = Failure(status, message, headers={name.lower(): value for name, value in headers.items()})
    metrics.refused(failure.error_type)
    return _failed(failure)


async def _server_error(request: Request, error: Exception) -> Response:
    return _failed(failure_of(error))


def _failed(failure: Failure) -> Response:
    body, headers = failure_reply(failure)
    return Response(body, failure.status, headers)


def _json(document: Any, status: int = 200) -> Response:
    body, headers = encoded(document)
    return Response(body, status, headers)
