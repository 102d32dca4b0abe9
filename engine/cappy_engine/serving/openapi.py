"""Describe the server's interface as an OpenAPI 3.1 document. Knows nothing of the web framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cappy_engine.serving.dialects import kserve, tei
from cappy_engine.serving.dialects.examples import EXAMPLES
from cappy_engine.serving.dialects.routes import Route

JSON = "application/json"
BINARY = "application/octet-stream"
Json = dict[str, Any]


class Status(msgspec.Struct, frozen=True):
    """How the server is: alive, ready, loading, draining, broken."""

    status: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """What every error answers, whatever the dialect. `error` and `message` are the same sentence."""

    error: Annotated[str, Meta(description="What is wrong, and what to do about it.")]
    error_type: Annotated[str, Meta(description="The kind of the error: validation, overloaded, unauthorized, ...")]
    message: Annotated[str, Meta(description="The same sentence, where Cohere's clients look for it.")]
    pair: Annotated[int | None, Meta(description="The place of the pair that cannot be scored, if any.")] = None


@dataclass(frozen=True)
class Look:
    """A path to GET. `answer` is a type, or the media type of a text; `needs_key` is false for probes.

    With `may_be_unready` the answer may come with 503, too.
    """

    path: str
    operation: str
    summary: str
    answer: Any
    needs_key: bool = True
    may_be_unready: bool = False
    errors: tuple[int, ...] = ()


LOOKS = (
    Look("/health", "health", "Whether the server runs", Status, needs_key=False),
    Look("/ready", "ready", "Whether the server can score", Status, needs_key=False, may_be_unready=True),
    Look("/info", "info", "What is served, how it runs, and the limits", Json, errors=(503,)),
    Look("/metrics", "metrics", "Counters and times for Prometheus", "text/plain"),
    Look("/v2", "kserve_server", "What the server is (KServe v2)", kserve.ServerMetadata),
    Look("/v2/health/live", "kserve_live", "Whether the server runs (KServe v2)", kserve.ServerLive, needs_key=False),
    Look(
        "/v2/health/ready",
        "kserve_ready",
        "Whether the server can score (KServe v2)",
        kserve.ServerReady,
        needs_key=False,
        may_be_unready=True,
    ),
    Look(
        "/v2/models/{name}",
        "kserve_model",
        "What the model takes and gives (KServe v2)",
        kserve.ModelMetadata,
        errors=(404, 503),
    ),
    Look(
        "/v2/models/{name}/ready",
        "kserve_model_ready",
        "Whether the model can score (KServe v2)",
        kserve.ModelReady,
        may_be_unready=True,
        errors=(404,),
    ),
)
"""What the server answers to GET, but for its pages."""
PROBES = {look.path for look in LOOKS if not look.needs_key}
"""What a supervisor asks, such as Kubernetes."""

ERRORS = {
    400: "The body is not JSON in UTF-8, or the request is not valid HTTP.",
    401: "The key is missing or wrong.",
    404: "There is no such path or model.",
    408: "The body came too slowly.",
    413: "The body or the count of pairs is over its limit.",
    415: "The body says to be something else than JSON in UTF-8, or is packed.",
    422: "The request has another shape, or a pair cannot be scored.",
    429: "The queue is full. Retry-After says when to ask again.",
    500: "The model failed.",
    503: "The server is not ready, or ends, or did not score in time.",
}
"""What may go wrong with a request, by status."""

_ERROR: Json = {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}
_NAME: Json = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "The model's name.",
}
_LENGTH: Json = {
    "name": kserve.JSON_LENGTH_HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 0},
    "description": "How many bytes of the body are JSON, where tensors follow.",
}
_TWO_TEXTS: Json = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}


def describe(routes: Sequence[Route], version: str, *, needs_key: bool = False) -> Json:
    """Describe the interface: `routes` that are posted to, and LOOKS.

    >>> describe(ROUTES, "1.0")["openapi"]
    '3.1.0'
    """
    types = [each for route in routes for each in (*route.requests, *route.answers)]
    types += [look.answer for look in LOOKS if not isinstance(look.answer, str)]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorAnswer], ref_template="#/components/schemas/{name}"
    )
    by_type = {str(each): schema for each, schema in zip(types, schemas, strict=False)}
    components[tei.TeiPredictRequest.__name__]["properties"]["inputs"] |= _inputs_of_predict()
    paths: Json = {}
    for look in LOOKS:
        paths[look.path] = {"get": _look(look, by_type, needs_key)}
    for route in routes:
        paths.setdefault(route.path, {})["post"] = _post(route, by_type, needs_key)
    for path, item in paths.items():
        if "{name}" in path:
            item["parameters"] = [_NAME]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cappy",
            "version": version,
            "summary": "Scores of (instruction, response) pairs.",
            "description": "Scores are the model's raw outputs in every dialect, unless a request asks for a sigmoid.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {str(status): _error(status) for status in ERRORS},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _look(look: Look, by_type: Json, needs_key: bool) -> Json:
    schema, media = (
        ({"type": "string"}, look.answer) if isinstance(look.answer, str) else (by_type[str(look.answer)], JSON)
    )
    answer = {"description": look.summary + ".", "content": {media: {"schema": schema}}}
    unready = {"description": ERRORS[503], "content": {JSON: {"schema": {"anyOf": [schema, _ERROR]}}}}
    return {
        "operationId": look.operation,
        "summary": look.summary,
        "security": _security(needs_key and look.needs_key),
        "responses": {"200": answer}
        | ({"503": unready} if look.may_be_unready else {})
        | _errors((401, *look.errors), needs_key and look.needs_key),
    }


def _post(route: Route, by_type: Json, needs_key: bool) -> Json:
    examples = {each.__name__: {"value": EXAMPLES[each]} for each in route.requests}
    body = {JSON: {"schema": _any_of(route.requests, by_type), "examples": examples}}
    answer = {JSON: {"schema": _any_of(route.answers, by_type)}}
    described: Json = {
        "operationId": route.operation,
        "summary": route.summary,
        "description": f"Takes requests of: {route.dialects}.",
        "security": _security(needs_key),
    }
    if route.has_tensors:
        tensors: Json = {BINARY: {"schema": {"description": "JSON, then the tensors that it names."}}}
        body, answer = body | tensors, answer | tensors
        described["parameters"] = [_LENGTH]
    return described | {
        "requestBody": {"required": True, "content": body},
        "responses": {
            "200": {"description": "The scores.", "content": answer},
            **_errors(tuple(ERRORS), needs_key),
        },
    }


def _any_of(types: Sequence[Any], by_type: Json) -> Json:
    schemas = [by_type[str(each)] for each in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _errors(statuses: Sequence[int], needs_key: bool) -> Json:
    return {
        str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses if needs_key or status != 401
    }


def _error(status: int) -> Json:
    described: Json = {
        "description": ERRORS[status],
        "content": {JSON: {"schema": _ERROR}},
    }
    if status == 429:
        described["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}}
    return described


def _security(needs_key: bool) -> list[Json]:
    return [{"bearer": []}, {"key": []}] if needs_key else []


def _inputs_of_predict() -> Json:
    """Give what the type of `inputs` cannot say: one pair, or a list of pairs."""
    return {"anyOf": [_TWO_TEXTS, {"type": "array", "items": _TWO_TEXTS, "minItems": 1}]}
