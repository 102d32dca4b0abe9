"""One model takes the place of another, while requests come, while the old one runs, and while the server stops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cappy_engine.batching import Grouping
from cappy_engine.bundle import open_bundle
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import ModelBroken, QueueClosed, ScoringError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.loaded import LoadedModel
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.queue import Reservation
from cappy_engine.serving.requests import ScoringRequest, ScoringResult
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from cappy_engine.session import open_session
from tests.support.gated import SECONDS, Gate

OPTIONS = ScorerOptions(precision="fp32", device="cpu")


class Opened:
    """The models that were opened: a gate for each; while `may_open` is not set, the next one waits."""

    def __init__(self, bundle: Path) -> None:
        self.may_open = threading.Event()
        self.may_open.set()
        self.asked = 0
        self.gates: list[Gate] = []
        self._bundle = open_bundle(bundle)
        self._open_with = Scorer.open_with

    def open(self, bundle: str | Path, options: ScorerOptions) -> Scorer:
        self.asked += 1
        assert self.may_open.wait(SECONDS)
        self.gates.append(Gate(open_session(self._bundle.model("fp32", "cpu"), threads=1)))
        dispatcher = Dispatcher(self.gates[-1], Grouping(512, "removed"), pad_token_id=1)
        found = self._open_with(bundle, options)
        return Scorer(found.tokenizer, dispatcher, bundle=self._bundle, info=found.info, options=options)

    def let(self) -> None:
        self.may_open.set()
        for gate in self.gates:
            gate.is_open.set()


@pytest.fixture
def opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Have models opened with gates."""
    found = Opened(bundle)
    monkeypatch.setattr(Scorer, "open_with", found.open)
    yield found
    found.let()


@pytest.fixture
def service(bundle: Path, opened: Opened) -> Iterator[Service]:
    """Give a service that answers with its first model."""
    made = Service(bundle, OPTIONS, ServerOptions(), metrics=Metrics())
    made.load()
    yield made
    opened.let()
    made.close(SECONDS)


def asked(service: Service, response: str = "Yes") -> ScoringResult:
    """Ask a service, and wait for the result."""
    request = ScoringRequest([("Is the sky blue?", response)], lambda result: result)
    return asyncio.run(asyncio.wait_for(service.score(request, "1"), SECONDS))


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    ends = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.01)


def is_closed(model: LoadedModel) -> bool:
    """Tell if a model is free."""
    try:
        model.scorer.score([("Is the sky blue?", "Yes")])
    except ScoringError:
        return True
    return False


def test_a_request_that_meets_a_model_which_leaves_is_answered_by_the_next_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the model and the room in its queue, another model takes its place."""
    reserve = LoadedModel.reserve
    met: list[LoadedModel] = []

    def reserve_late(model: LoadedModel, request: ScoringRequest, chars: int) -> Reservation:
        met.append(model)
        if len(met) == 1:
            service.load()
            until(lambda: is_closed(model))
        return reserve(model, request, chars)

    monkeypatch.setattr(LoadedModel, "reserve", reserve_late)
    assert asked(service).scored.scores.shape == (1,)
    assert len(met) == 2
    assert met[1] is service.model is not met[0]


def test_a_request_that_comes_when_the_last_model_is_closed_hears_so(service: Service) -> None:
    service.model.close(SECONDS)
    with pytest.raises(QueueClosed):
        asked(service)


def test_a_model_that_leaves_answers_what_it_took_and_is_freed(service: Service, opened: Opened) -> None:
    old, gate = service.model, opened.gates[0]
    gate.has_begun.clear()
    gate.is_open.clear()
    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(asked, service)
        assert gate.has_begun.wait(SECONDS)
        waits = threads.submit(asked, service, "No")
        until(lambda: old.queue.waiting()[0] == 1)
        service.load()
        assert asked(service).scored.scores.shape == (1,)
        gate.is_open.set()
        assert runs.result(SECONDS).scored.scores.shape == waits.result(SECONDS).scored.scores.shape == (1,)
    until(lambda: is_closed(old))
    assert not is_closed(service.model)


def test_there_are_two_models_at_once_and_not_three(service: Service, opened: Opened) -> None:
    gate = opened.gates[0]
    gate.has_begun.clear()
    gate.is_open.clear()
    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(asked, service)
        assert gate.has_begun.wait(SECONDS)
        service.load()
        again = threads.submit(service.load)
        time.sleep(0.3)  # in which a third one would be opened
        assert opened.asked == 2
        gate.is_open.set()
        assert again.result(SECONDS)
        assert runs.result(SECONDS).scored.scores.shape == (1,)
    assert opened.asked == 3


def test_a_service_that_closes_waits_until_the_model_before_is_free(service: Service, opened: Opened) -> None:
    old, gate = service.model, opened.gates[0]
    gate.has_begun.clear()
    gate.is_open.clear()
    with ThreadPoolExecutor(2) as threads:
        runs = threads.submit(asked, service)
        assert gate.has_begun.wait(SECONDS)
        service.load()
        closes = threads.submit(service.close, SECONDS)
        until(lambda: is_closed(service.model))
        time.sleep(0.2)  # in which it would be done, if it did not wait
        assert not closes.done()
        gate.is_open.set()
        closes.result(SECONDS)
        assert is_closed(old)
        assert runs.result(SECONDS).scored.scores.shape == (1,)


def test_a_model_that_fails_when_another_has_its_place_does_not_end_the_service(
    service: Service, opened: Opened
) -> None:
    broken: list[ModelBroken] = []
    service.on_broken = broken.append
    old, gate = service.model, opened.gates[0]
    gate.has_begun.clear()
    gate.is_open.clear()
    with ThreadPoolExecutor(1) as threads:
        runs = threads.submit(asked, service)
        assert gate.has_begun.wait(SECONDS)
        service.load()
        gate.is_worn = True
        gate.is_open.set()
        assert isinstance(runs.exception(SECONDS), (ModelBroken, ScoringError, QueueClosed))
    until(lambda: is_closed(old))
    assert (service.state, broken) == ("ready", [])
    assert asked(service).scored.scores.shape == (1,)
    opened.gates[1].is_worn = True
    with pytest.raises((ModelBroken, ScoringError, QueueClosed)):
        asked(service)
    until(lambda: service.state == "broken")
    assert len(broken) == 1
    service.drain()
    assert service.state == "broken"


def test_a_model_that_is_there_when_the_server_stops_is_not_used(service: Service, opened: Opened) -> None:
    first = service.model
    opened.may_open.clear()
    with ThreadPoolExecutor(1) as threads:
        loads = threads.submit(service.load)
        until(lambda: opened.asked == 2)
        service.drain()
        opened.may_open.set()
        assert not loads.result(SECONDS)
    assert (service.state, service.model) == ("draining", first)
    assert asked(service).scored.scores.shape == (1,)


def test_what_waits_is_told_in_pairs_and_tokens(service: Service, opened: Opened) -> None:
    gate, tokens = opened.gates[0], int(service.model.scorer.encode([("Is the sky blue?", "No")]).lengths[0])
    gate.has_begun.clear()
    gate.is_open.clear()
    page = service.metrics.page().decode()
    assert 'cappy_pairs_total{device="cpu",precision="fp32"} 0.0\n' in page
    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(asked, service)]
        assert gate.has_begun.wait(SECONDS)
        asking.append(threads.submit(asked, service, "No"))
        until(lambda: service.model.queue.waiting()[0] == 1)
        page = service.metrics.page().decode()
        assert "cappy_queue_pairs 1.0\n" in page
        assert f"cappy_queue_tokens {float(tokens)}\n" in page
        gate.is_open.set()
