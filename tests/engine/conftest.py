"""Give the engine's tests the committed bundle: they run where there is no PyTorch and no exporter."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import copy_bundle
from tests.support.places import TINY


@pytest.fixture(scope="session")
def bundle() -> Path:
    """Give the tiny bundle. It is read-only: `copy` is one to break."""
    return TINY


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Give a copy of the tiny bundle that may be broken."""
    return copy_bundle(tmp_path / "copy")


@pytest.fixture(scope="session")
def tokenizer(bundle: Path) -> PairTokenizer:
    """Open the tiny bundle's tokenizer."""
    return PairTokenizer.from_file(bundle / "tokenizer.json", max_length=512)
