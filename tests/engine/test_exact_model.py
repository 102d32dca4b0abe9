"""The fp32 model of `exact_winner`: opened when it is first needed, once, and never by a scorer that was closed."""

from __future__ import annotations

import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cappy_engine import Scorer
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import BundleError, ScoringError
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


def test_a_lack_of_open_files_is_not_called_a_changed_bundle(bundle: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Scorer.open(bundle, precision="int8", device="cpu") as scorer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(BundleError, match="Too many open files") as caught:
                scorer.exact.open()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "changed since it was opened" not in str(caught.value)
        assert len(scorer.exact.run(scorer.encode([("Is it?", "Yes")]))) == 1


def test_an_exact_model_that_opens_while_its_scorer_is_closed_is_closed_too(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[Dispatcher]()

    def overtaken(*arguments: Any, name: str) -> Any:
        found = open_dispatcher(*arguments, name=name)
        opened.append(found[0])
        scorer.close()
        return found

    monkeypatch.setattr("cappy_engine.exact.open_dispatcher", overtaken)
    scorer = Scorer.open(bundle, precision="int8", device="cpu")
    encoded = scorer.encode([("Is it?", "Yes")])
    with pytest.raises(ScoringError, match="was closed"):
        scorer.exact.run(encoded)
    [dispatcher] = opened
    with pytest.raises(ScoringError, match="was closed"):
        dispatcher.run(encoded)
