"""Give tests of outputs the names of a file that is written."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("out.jsonl.partial")
