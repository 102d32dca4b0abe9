"""What the server is asked and what it finds, whatever the dialect of the request. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import Pair, TooLong
from cappy_engine.scored import Scored


@dataclass(frozen=True)
class ServedModel:
    """The model that answers: the `names` that requests may call it (the first is its own), and how it runs."""

    names: tuple[str, ...]
    device: str
    precision: str
    max_length: int

    @property
    def name(self) -> str:
        """Give the name that answers carry."""
        return self.names[0]

    def check_name(self, asked: str | None) -> None:
        """Raise InvalidRequest (404) for the name of another model; None and an empty name are the one there is.

        >>> ServedModel(("cappy-mini",), "cpu", "int8", 512).check_name("cappy-mini")
        """
        if asked and asked not in self.names:
            raise InvalidRequest(
                f"model {asked[:100]!r} is not served here, only {', '.join(self.names)}; name that one or none, or "
                "start the server with another --model-name",
                404,
            )


@dataclass(frozen=True)
class Stages:
    """Holds the seconds that a request took: to be tokenised, to wait, to be scored, and all in all."""

    tokenize: float = 0.0
    queue: float = 0.0
    score: float = 0.0
    total: float = 0.0

    def items(self) -> list[tuple[str, float]]:
        """List the stages by name.

        >>> Stages(total=0.5).items()[-1]
        ('total', 0.5)
        """
        return [("tokenize", self.tokenize), ("queue", self.queue), ("score", self.score), ("total", self.total)]


@dataclass(frozen=True)
class ScoringResult:
    """What was found for the pairs of a request, in their order.

    `exact` holds the scores in fp32 by the place of a pair, for the candidates that were scored again. `created` is
    the time in seconds since 1970.
    """

    scored: Scored
    model: ServedModel
    request_id: str
    created: int
    exact: Mapping[int, float] = field(default_factory=dict)
    stages: Stages = field(default_factory=Stages)

    @property
    def tokens(self) -> int:
        """Count the tokens of all pairs."""
        return int(self.scored.token_counts.sum())

    @property
    def truncated(self) -> int:
        """Count the pairs that were truncated."""
        return int(self.scored.truncated.sum())


@dataclass(frozen=True)
class Reply:
    """An answer that is not JSON: its bytes, and the headers that go with them."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True)
class ScoringRequest:
    """The `pairs` to score, and `answer`, which makes the reply of their result: what msgspec encodes, or a Reply.

    With `exact_winner` the candidates between which int8's error could decide are scored again in fp32.
    """

    pairs: Sequence[Pair]
    answer: Callable[[ScoringResult], object]
    too_long: TooLong = "truncate"
    exact_winner: bool = False
