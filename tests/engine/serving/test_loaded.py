"""A model at work: what it expects of requests, before their tokens are made."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cappy_engine.errors import QueueFull
from cappy_engine.options import ScorerOptions
from cappy_engine.serving.loaded import LoadedModel
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.requests import ScoringRequest
from cappy_engine.serving.server_options import ServerOptions

TEXT = "Is the sky blue, or is it green? " * 4


@pytest.fixture
def loaded(bundle: Path) -> Iterator[LoadedModel]:
    """Give a model whose queue takes 512 tokens."""
    options = ServerOptions(max_queue_tokens=512)
    model = LoadedModel(bundle, ScorerOptions(precision="int8"), options, Metrics(), lambda model, error: None)
    yield model
    model.close()


def request_of(pairs: int) -> ScoringRequest:
    """Make a request of pairs that are not alike."""
    return ScoringRequest([(TEXT, str(number)) for number in range(pairs)], answer=lambda result: result)


def test_a_request_that_will_not_fit_is_refused_before_its_tokens_are_made(loaded: LoadedModel) -> None:
    tokens = int(loaded.scorer.encode(request_of(1).pairs).lengths.sum())
    with loaded.reserve(request_of(1), 0), loaded.reserve(request_of(40), 0):  # nothing is known of tokens yet
        pass
    with ThreadPoolExecutor(1) as encoder, loaded.reserve(request_of(1), 0) as place:
        loaded.score(request_of(1), place, float("inf"), encoder).result(timeout=20)
    fits = 512 // tokens - 1
    with loaded.reserve(request_of(1), 0):
        with loaded.reserve(request_of(fits), 0):
            pass
        with loaded.reserve(ScoringRequest([request_of(1).pairs[0]] * 500, lambda result: result), 0):  # they wait once
            pass
        with loaded.reserve(ScoringRequest([("word " * 10_000, "Yes")], lambda result: result), 0):  # it will be cut
            pass
        with pytest.raises(QueueFull, match=f"{fits + 4} more do not fit"):
            loaded.reserve(request_of(fits + 4), 0)
