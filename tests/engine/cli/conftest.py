"""Give the commands' tests a file of pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import write_pairs


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Give five good rows with a blank line among them."""
    return write_pairs(tmp_path / "pairs.jsonl")
