"""Say what a client is told of an error: one table from our errors to HTTP's statuses, and one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cappy_engine.errors import (
    DeadlinePassed,
    InvalidPair,
    InvalidRequest,
    ModelBroken,
    NotReady,
    QueueClosed,
    QueueFull,
    ScoringError,
)

ERROR_TYPES: Mapping[int, str] = {
    400: "validation",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "validation",
    422: "validation",
    429: "overloaded",
    500: "backend",
    501: "validation",
    503: "unhealthy",
    505: "validation",
}
"""The `error_type` of an answer, in the words of text-embeddings-inference where it has one."""

STATUSES: Mapping[type[Exception], int] = {
    InvalidPair: 422,
    QueueFull: 429,
    QueueClosed: 503,
    NotReady: 503,
    DeadlinePassed: 503,
    ModelBroken: 503,
}
"""The status of each of our errors. A ScoringError that one pair explains is 422; what is not listed is 500."""


@dataclass(frozen=True)
class Failure:
    """The answer to a request that was not scored; `pair` is the place of the pair that is at fault."""

    status: int
    message: str
    pair: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def error_type(self) -> str:
        """Name the kind of error."""
        return ERROR_TYPES.get(self.status, "validation" if self.status < 500 else "backend")

    def document(self) -> dict[str, object]:
        """Make the body: TEI's and KServe's clients read `error`, Cohere's `message`.

        >>> Failure(401, "an API key is needed").document()["error_type"]
        'unauthorized'
        """
        return {"error": self.message, "error_type": self.error_type, "message": self.message, "pair": self.pair}


def failure_of(error: Exception) -> Failure:
    """Look up what a client is told of an error.

    >>> failure_of(InvalidPair(3, "response is not a string")).status
    422
    """
    index = getattr(error, "index", None)
    if isinstance(error, InvalidRequest):
        return Failure(error.status, str(error))
    if isinstance(error, ScoringError):
        return Failure(500 if index is None else 422, str(error), index)
    status = next((found for kind, found in STATUSES.items() if isinstance(error, kind)), 500)
    if status == 500:
        return Failure(500, "the server failed; its log says why")
    seconds = error.retry_seconds if isinstance(error, QueueFull) else 1 if status == 503 else None
    headers = {} if seconds is None else {"retry-after": str(seconds)}
    return Failure(status, str(error), index, headers)
