"""Share a server between the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cappy_engine.scorer import Scorer
from cappy_engine.serving.jobs import QueueLimits
from cappy_engine.serving.queue import ScoringQueue
from tests.support.gated import SECONDS, Gated
from tests.support.servers import Server, serving


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Server]:
    """Give a server of the tiny bundle in int8, with narrow limits."""
    options = (
        "--max-pairs 50 --max-body-bytes 100000 --body-seconds 0.5 --max-text-chars 20000 --max-queue-tokens 50000"
    )
    names = ("--model-name", "tiny", "--model-name", "other")
    with serving("--bundle", str(bundle), "--precision", "int8", *options.split(), *names) as running:
        yield running


@pytest.fixture(scope="session")
def scorer(bundle: Path) -> Iterator[Scorer]:
    """Give a scorer of the same model."""
    with Scorer.open(bundle, precision="int8") as opened:
        yield opened


LIMITS = QueueLimits(max_pairs=100, max_tokens=1000, step_tokens=100)


@pytest.fixture
def model() -> Iterator[Gated]:
    """Give a model whose runs wait until they are let go."""
    gated = Gated()
    yield gated
    gated.let()


@pytest.fixture
def start(model: Gated) -> Iterator[Callable[..., ScoringQueue]]:
    """Give a function that starts queues, which are closed at the end."""
    queues: list[ScoringQueue] = []

    def make(limits: QueueLimits = LIMITS, **hooks: Callable[..., None]) -> ScoringQueue:
        queues.append(ScoringQueue(model, limits, **hooks))
        return queues[-1]

    yield make
    model.let()
    for queue in queues:
        queue.close(wait_seconds=SECONDS)
