"""Give tests of runs a scorer without a model, and the names of a file that is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from cappy_engine import Scorer
from cappy_engine.testing import fake_scorer
from cappy_engine.tokenizer import PairTokenizer


@pytest.fixture(scope="module")
def scorer(tokenizer: PairTokenizer) -> Scorer:
    return fake_scorer(tokenizer=tokenizer)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("out.jsonl.partial")
