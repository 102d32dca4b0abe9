"""Share a server between the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cappy_engine.scorer import Scorer
from tests.support.servers import Server, serving


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Server]:
    """Give a server of the tiny bundle in int8, with narrow limits."""
    options = "--max-pairs 50 --max-body-bytes 100000 --body-seconds 0.5 --max-text-chars 20000 --model-name tiny"
    with serving("--bundle", str(bundle), "--precision", "int8", *options.split(), "--model-name", "other") as running:
        yield running


@pytest.fixture(scope="session")
def scorer(bundle: Path) -> Iterator[Scorer]:
    """Give a scorer of the same model."""
    with Scorer.open(bundle, precision="int8") as opened:
        yield opened
