"""The fp32 model of `exact_winner`: opened when it is first needed, once, and never by a scorer that was closed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.errors import ScoringError
from cappy_engine.opening import open_dispatcher


def test_threads_that_need_the_exact_model_open_it_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ask at the same moment, and opening takes longer than asking."""
    opened, together = list[str](), threading.Barrier(4)

    def noted(*arguments: Any, name: str) -> Any:
        opened.append(name)
        time.sleep(0.1)
        return open_dispatcher(*arguments, name=name)

    def ask(scorer: Scorer) -> Any:
        together.wait()
        return scorer.exact.open()

    monkeypatch.setattr("cappy_engine.exact.open_dispatcher", noted)
    with Scorer.open(bundle, precision="int8", device="cpu") as scorer, ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(ask, [scorer] * 4)))) == 1
    assert len(opened) == 1
    with pytest.raises(ScoringError, match="was closed"):
        scorer.exact.open()
    assert len(opened) == 1
