"""Give the engine's tests the committed bundle: they run where there is no PyTorch and no exporter."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.tokenizer import PairTokenizer
from tests.support.places import TINY


@pytest.fixture(scope="session")
def bundle() -> Path:
    """Give the tiny bundle. It is read-only: `tests.support.bundles.copy_bundle` gives one to break."""
    return TINY


@pytest.fixture(scope="session")
def tokenizer(bundle: Path) -> PairTokenizer:
    """Open the tiny bundle's tokenizer."""
    return PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512)
