"""Answer one request: key, body, dialect, scores. The same way for every dialect; what it costs is in the headers."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from cappy_engine.errors import InvalidRequest, QueueClosed
from cappy_engine.serving.dialects.kserve import JSON_LENGTH_HEADER, read_infer
from cappy_engine.serving.dialects.routes import Route
from cappy_engine.serving.http.bodies import BodyRoom, ClientGone, cancelled_when_gone, read_body
from cappy_engine.serving.keys import ApiKeys, read_keys
from cappy_engine.serving.logs import FIELDS
from cappy_engine.serving.queue import STOPPED
from cappy_engine.serving.requests import Reply, ScoringRequest, ScoringResult
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from cappy_engine.serving.statuses import Failure, failure_of
from cappy_engine.serving.tracing import Tracer

GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
BODIES_AT_ONCE = 64
"""As many bodies of `max_body_bytes` may be arriving at once, or more that are smaller."""
LARGE_BYTES = 2**16
"""A larger body is decoded in a thread: one of 4 MB takes tenths of a second."""
UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")
"""The charsets that a body may say to have: ASCII is UTF-8, too."""
CLIENT_GONE = 499
"""What the log says of a request whose client went away, as nginx does."""

log = logging.getLogger("cappy.server")


@dataclass
class Gate:
    """What every endpoint shares: the service, its options, the keys that may ask, and whether the server stops."""

    service: Service
    options: ServerOptions
    keys: ApiKeys | None
    tracer: Tracer | None = None
    is_closing: bool = False
    bodies: BodyRoom = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = BodyRoom(BODIES_AT_ONCE * self.options.max_body_bytes)

    @classmethod
    def of(cls, service: Service, options: ServerOptions) -> Self:
        """Read the keys and begin to trace, as `options` ask. Raises ServingError and InstallationError.

        >>> gate = Gate.of(service, ServerOptions(api_key_file=Path("keys.txt")))
        """
        keys = None if options.api_key_file is None else read_keys(options.api_key_file)
        return cls(service, options, keys, Tracer() if options.tracing else None)

    def check_key(self, headers: Headers) -> None:
        """Raise InvalidRequest (401) unless the request has a key that may ask."""
        if self.keys is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not self.keys.accepts(key):
            what = "is not one of this server's" if key else "is missing"
            raise InvalidRequest(f"the API key {what}; send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'", 401)


class ScoringEndpoint:
    """Answers what is posted to a route, as an ASGI application."""

    def __init__(self, route: Route, gate: Gate) -> None:
        self._route = route
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        headers = Headers(scope=scope)
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if GOOD_ID.fullmatch(asked_id) else uuid.uuid4().hex
        result: ScoringResult | None = None
        try:
            request = await self._read(scope, headers, receive)
            result = await self._score(request, request_id, receive)
            reply = request.answer(result)
            status, body, extra = 200, *encoded(reply)
            extra = {**extra, **cost_headers(result)}
        except ClientGone:
            self._gate.service.metrics.abandoned()
            self._told(CLIENT_GONE, request_id, started, headers, result)
            return
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):  # by the server, whose time to end is over
                error = QueueClosed(STOPPED)
            failure = failure_of(error)
            if failure.status == 500:
                log.exception("a request failed", extra={FIELDS: {"request_id": request_id}})
            self._gate.service.metrics.refused(failure.error_type)
            status, body, extra = failure.status, *failure_reply(failure)
        if self._gate.is_closing:
            extra["connection"] = "close"
        await respond(send, status, body, {**extra, "x-request-id": request_id})
        if result is not None:
            self._gate.service.metrics.scored(result)
        self._told(status, request_id, started, headers, result)

    async def _read(self, scope: Scope, headers: Headers, receive: Receive) -> ScoringRequest:
        options = self._gate.options
        self._gate.check_key(headers)
        model = self._gate.service.model.card
        self._check_content(headers)
        with self._gate.bodies.of_one() as take:
            body = await read_body(
                receive,
                headers.get("content-length"),
                max_bytes=options.max_body_bytes,
                seconds=options.body_seconds,
                take=take,
            )
            if not body or body.isspace():
                raise InvalidRequest("the body is empty; send a JSON object", 400)
            if (name := scope.get("path_params", {}).get("name")) is not None:
                model.check_name(name)
            read = partial(self._route.read, body, model)
            if self._route.has_tensors:
                read = partial(read_infer, body, model, headers.get(JSON_LENGTH_HEADER))
            return read() if len(body) <= LARGE_BYTES else await self._gate.service.aside(read)

    def _check_content(self, headers: Headers) -> None:
        """Raise InvalidRequest (415) if the headers announce a body other than JSON in UTF-8."""
        kind, *parameters = (part.strip().lower() for part in headers.get("content-type", "").split(";"))
        if kind and not (kind == "application/json" or kind.endswith("+json") or self._route.has_tensors):
            raise InvalidRequest(f"the body is {kind[:80]!r}; send JSON, with 'Content-Type: application/json'", 415)
        for name, _, value in (parameter.partition("=") for parameter in parameters):
            if name.strip() == "charset" and (charset := value.partition(",")[0].strip(" \t\"'")) not in UTF8:
                problem = f"the body's charset is {charset[:80]!r}, and bodies are UTF-8"
                raise InvalidRequest(f"{problem}; send it so, with 'Content-Type: application/json'", 415)
        codings = ",".join(headers.getlist("content-encoding")).split(",")
        if any(coding.strip().lower() not in ("", "identity") for coding in codings):
            raise InvalidRequest("the body is packed, and packed bodies are not taken; send it as it is", 415)

    async def _score(self, request: ScoringRequest, request_id: str, receive: Receive) -> ScoringResult:
        """Score a request, and stop where its client goes away."""
        async with cancelled_when_gone(receive):
            return await self._gate.service.score(request, request_id)

    def _told(
        self, status: int, request_id: str, started: float, headers: Headers, result: ScoringResult | None
    ) -> None:
        """Log and trace a request that was answered, or whose client went away."""
        if self._gate.tracer is not None:
            self._gate.tracer.trace(self._route.path, headers, status, time.monotonic() - started, result)
        if not self._gate.options.log_requests:
            return
        fields: dict[str, object] = {"route": self._route.path, "status": status, "request_id": request_id}
        if result is not None:
            fields["pairs"] = len(result.scored.scores)
            fields["tokens"] = result.tokens
            fields["truncated"] = result.truncated
        fields["ms"] = round(1000 * (time.monotonic() - started), 3)
        log.info("request", extra={FIELDS: fields})


def encoded(reply: object) -> tuple[bytes, dict[str, str]]:
    """Write a reply: its body, and its headers.

    >>> encoded({"score": 0.93})
    (b'{"score":0.93}', {'content-type': 'application/json'})
    """
    if isinstance(reply, Reply):
        return reply.body, dict(reply.headers)
    return msgspec.json.encode(reply), {"content-type": "application/json"}


def failure_reply(failure: Failure) -> tuple[bytes, dict[str, str]]:
    """Write the answer to a request that was not scored.

    >>> failure_reply(Failure(401, "an API key is needed"))[1]["www-authenticate"]
    'Bearer'
    """
    body, headers = encoded(failure.document())
    headers.update(failure.headers)
    if failure.status == 401:
        headers["www-authenticate"] = "Bearer"
    return body, headers


def cost_headers(result: ScoringResult) -> dict[str, str]:
    """Say in headers what a request cost, in tokens and milliseconds.

    >>> cost_headers(result)["x-cappy-tokens"]
    '20'
    """
    stages = [(stage, f"{1000 * seconds:.3f}") for stage, seconds in result.stages.items()]
    return {
        "x-cappy-tokens": str(result.tokens),
        "x-cappy-truncated": str(result.truncated),
        **{f"x-cappy-{stage}-ms": milliseconds for stage, milliseconds in stages},
        "server-timing": ", ".join(f"{stage};dur={milliseconds}" for stage, milliseconds in stages),
    }


async def respond(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """Send a whole answer."""
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    lines.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
