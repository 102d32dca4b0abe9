"""A service tells where a request's time went, and that its model hangs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cappy_engine.batching import Grouping
from cappy_engine.bundle import open_bundle
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import DeadlinePassed, ModelBroken
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.http import running
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.requests import ScoringRequest, ScoringResult
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from cappy_engine.session import open_session
from tests.support.gated import SECONDS, Gate


@pytest.fixture
def gate(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Give the gate of the model that services load."""
    found = Gate(open_session(open_bundle(bundle).model("fp32", "cpu"), threads=1))
    dispatcher = Dispatcher(found, Grouping(512, "removed"), pad_token_id=1)
    monkeypatch.setattr(Scorer, "dispatcher", property(lambda scorer: dispatcher))
    yield found
    found.is_open.set()


def start(bundle: Path, gate: Gate, server: ServerOptions) -> Service:
    """Load the model, and close the gate behind its canary."""
    service = Service(bundle, ScorerOptions(precision="fp32", device="cpu"), server, metrics=Metrics())
    service.load()
    gate.has_begun.clear()
    gate.is_open.clear()
    return service


def ask(service: Service, response: str) -> asyncio.Task[ScoringResult]:
    request = ScoringRequest([("Is the sky blue?", response)], lambda result: result)
    return asyncio.ensure_future(service.score(request, response))


async def begun(gate: Gate) -> None:
    await asyncio.to_thread(gate.has_begun.wait, SECONDS)


@pytest.mark.slow
def test_the_time_that_a_request_waited_is_not_told_as_another_stages(bundle: Path, gate: Gate) -> None:
    service = start(bundle, gate, ServerOptions())

    async def run() -> tuple[ScoringResult, ScoringResult]:
        first = ask(service, "Yes")
        await begun(gate)
        second = ask(service, "No")
        while not service.model.queue.waiting()[0]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.4)
        gate.is_open.set()
        return await first, await second

    ran, waited = (result.stages for result in asyncio.run(run()))
    service.close(SECONDS)
    assert min(ran.score, ran.total, waited.queue, waited.total) >= 0.4


@pytest.mark.slow
def test_a_service_whose_model_hangs_says_that_it_is_broken_until_it_goes_on(bundle: Path, gate: Gate) -> None:
    service = start(bundle, gate, ServerOptions(request_seconds=1))

    async def run() -> None:
        hanging = ask(service, "Yes")
        await begun(gate)
        assert service.state == "ready"
        with pytest.raises(DeadlinePassed, match=r"not answered in 1 seconds?"):
            await hanging
        while service.state == "ready":
            await asyncio.sleep(0.01)
        assert service.state == "broken"
        gate.is_open.set()
        while service.state == "broken":
            await asyncio.sleep(0.01)
        assert service.state == "ready"
        assert (await ask(service, "No")).scored.scores.shape == (1,)

    asyncio.run(asyncio.wait_for(run(), SECONDS))
    service.close(SECONDS)


def test_a_service_that_found_its_model_hanging_stays_broken_when_the_run_ends(bundle: Path, gate: Gate) -> None:
    """The process is about to end: nobody should send it requests."""
    service = start(bundle, gate, ServerOptions(request_seconds=0.01))
    queue = service.model.queue
    assert service.find_hanging(math.inf) is None
    with queue.reserve(1) as place:
        job = place.submit(service.model.scorer.encode([("Is the sky blue?", "Yes")]))
    assert gate.has_begun.wait(SECONDS)
    ends = time.monotonic() + SECONDS
    while not (found := service.find_hanging(math.inf)):
        assert (time.monotonic() < ends, service.find_hanging(0.1)) == (True, None), "it may have been stopped"
        time.sleep(0.001)
    assert "a run of the model has not ended in 0.1 seconds" in str(found)
    gate.is_open.set()
    assert job.future.result(SECONDS).shape == (1,)
    service.model.close(SECONDS)
    assert queue.running_seconds() == 0
    assert service.state == "broken"
    service.close(SECONDS)


def test_the_time_in_which_the_process_was_stopped_is_none_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WATCH_SECONDS", 0.05)
    awake: list[float] = []

    def find(seconds: float) -> ModelBroken | None:
        awake.append(seconds)
        if len(awake) == 1:
            asyncio.get_running_loop().call_soon(time.sleep, 0.5)  # nothing runs meanwhile, as after SIGSTOP
        return ModelBroken("a run hangs") if len(awake) == 2 else None

    server: Any = SimpleNamespace(_service=SimpleNamespace(find_hanging=find), _stop=lambda error: None)
    asyncio.run(running._Server._watch(server))
    assert awake[1] < 0.4
