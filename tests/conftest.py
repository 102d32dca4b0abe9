"""Share what the tests of every room need. A room's own conftest.py says which bundle its tests get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import DATA

collect_ignore = ["clients"]
"""They run in an environment of their own, with `make clients`."""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `cappy tune` found on this machine from the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPPY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def roberta_tokenizer_files() -> Path:
    """Give the folder of the genuine RoBERTa tokenizer; skips where the data is not present."""
    folder = DATA / "roberta-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the genuine RoBERTa tokenizer in {folder}")
    return folder
