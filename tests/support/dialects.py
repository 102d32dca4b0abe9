"""Ask what a dialect reads and answers, with made-up scores: bytes go in, what a client sees comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import Pair
from cappy_engine.scored import Scored
from cappy_engine.serving.requests import Reply, ScoringRequest, ScoringResult, ServedModel
from cappy_engine.testing import fake_scorer

MODEL = ServedModel(("cappy-mini", "rerank"), "cpu", "int8", 512)
SCORER = fake_scorer()
LONG = "blue sky " * 600
"""More tokens than a pair may have."""

Read = Callable[[bytes, ServedModel], ScoringRequest]


def request_of(read: Read, body: object) -> ScoringRequest:
    """Read a body: bytes as they are, anything else as JSON."""
    return read(body if isinstance(body, bytes) else msgspec.json.encode(body), MODEL)


def reply_to(read: Read, body: object, *, scores: Sequence[float] | None = None) -> Any:
    """Read a body, score its pairs, and return the answer: a Reply, or what its JSON holds. `scores` may be given."""
    request = request_of(read, body)
    found = SCORER.score_pairs(request.pairs, too_long=request.too_long)
    if scores is not None:
        found = Scored(np.array(scores, np.float32), found.token_counts, found.truncated)
    answer = request.answer(ScoringResult(found, MODEL, "a1b2", 1_700_000_000))
    return answer if isinstance(answer, Reply) else msgspec.json.decode(msgspec.json.encode(answer))


def scores_of(pairs: Sequence[Pair]) -> list[float]:
    """Score pairs as a client's answer should have them."""
    return [float(score) for score in SCORER.score(pairs)]


def paired(instruction: str, responses: Sequence[str]) -> list[Pair]:
    """Pair an instruction with its responses."""
    return [(instruction, response) for response in responses]


def best_first(scores: Sequence[float]) -> list[int]:
    """Order the places of scores."""
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def refusal(read: Read, body: object, status: int = 422) -> str:
    """Read what must be refused, and return why."""
    with pytest.raises(InvalidRequest) as caught:
        request_of(read, body)
    assert caught.value.status == status, caught.value
    return str(caught.value)
