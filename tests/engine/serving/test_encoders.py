"""Long texts are tokenised beside short ones, and none for nobody; the event loop waits for neither."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Scope

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import InvalidRequest, QueueClosed
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.serving.dialects.routes import ROUTES
from cappy_engine.serving.http.endpoint import Gate, ScoringEndpoint
from cappy_engine.serving.loaded import LoadedModel
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, ServedModel
from cappy_engine.serving.server_options import ServerOptions
from cappy_engine.serving.service import Service
from tests.support.gated import SECONDS

SKY = "Is the sky blue?"
LONG = "word " * (2**16 // 5 + 1)


class Encoding:
    """Tokenising that waits for texts that begin with "slow", until it is let go; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.has_begun = threading.Event()
        self.may_go = threading.Event()
        self._encode: Callable[..., EncodedPairs] = Scorer.encode

    def encode(self, scorer: Scorer, pairs: Any, **options: Any) -> EncodedPairs:
        text = pairs[0][1]
        self.asked.append(text[:6])
        if text.startswith("slow"):
            self.has_begun.set()
            assert self.may_go.wait(SECONDS)
        return self._encode(scorer, pairs, **options)


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoding]:
    """Have texts tokenised when the test lets them."""
    found = Encoding()
    monkeypatch.setattr(Scorer, "encode", lambda scorer, pairs, **options: found.encode(scorer, pairs, **options))
    yield found
    found.may_go.set()


@pytest.fixture
def service(bundle: Path, encoding: Encoding) -> Iterator[Service]:
    """Give a service of the tiny bundle in int8."""
    made = Service(bundle, ScorerOptions(precision="int8", device="cpu"), ServerOptions(), metrics=Metrics())
    made.load()
    yield made
    encoding.may_go.set()
    made.close(SECONDS)


def ask(service: Service, *responses: str, instruction: str = SKY, exact: bool = False) -> asyncio.Task[ScoringResult]:
    pairs = [(instruction, response) for response in responses]
    request = ScoringRequest(pairs, lambda result: result, exact_winner=exact)
    return asyncio.ensure_future(service.score(request, "1"))


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, SECONDS))


def test_requests_with_short_texts_do_not_wait_for_one_with_long_texts(service: Service, encoding: Encoding) -> None:
    async def test() -> None:
        long = ask(service, "slow", instruction=LONG)
        await asyncio.to_thread(encoding.has_begun.wait, SECONDS)
        assert (await ask(service, "Yes")).scored.scores.shape == (1,)
        half = LONG[: 2**15]  # is tokenised once, however many answers it has
        assert (await ask(service, "Yes", "No", "Perhaps", instruction=half)).scored.scores.shape == (3,)
        assert not long.done()
        encoding.may_go.set()
        assert (await long).scored.scores.shape == (1,)

    run(test())


def test_texts_of_a_client_that_has_gone_are_not_tokenised(service: Service, encoding: Encoding) -> None:
    async def test() -> None:
        first = ask(service, "slow")
        await asyncio.to_thread(encoding.has_begun.wait, SECONDS)
        gone, last = ask(service, "gone"), ask(service, "last")
        while service.model.queue.encoding_chars() < 3 * len(SKY):
            await asyncio.sleep(0.001)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        encoding.may_go.set()
        await first
        await last
        assert encoding.asked == ["slow", "last"]

    run(test())


def test_an_fp32_model_that_is_opened_keeps_neither_the_event_loop_nor_short_texts_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_opening, may_open, open_exact = threading.Event(), threading.Event(), LoadedModel.open_exact

    def open_slowly(model: LoadedModel) -> None:
        is_opening.set()
        assert may_open.wait(SECONDS)
        open_exact(model)

    monkeypatch.setattr(LoadedModel, "open_exact", open_slowly)

    async def test() -> None:
        exact = ask(service, *(f"answer {number}" for number in range(12)), exact=True)
        await asyncio.to_thread(is_opening.wait, SECONDS)
        assert (await ask(service, "Yes")).scored.scores.shape == (1,)
        may_open.set()
        assert len((await exact).exact) > 1

    run(test())


def test_texts_that_wait_to_be_tokenised_when_a_service_closes_are_given_up(
    service: Service, encoding: Encoding
) -> None:
    async def test() -> None:
        first = ask(service, "slow")
        await asyncio.to_thread(encoding.has_begun.wait, SECONDS)
        second = ask(service, "second")
        while service.model.queue.encoding_chars() < 2 * len(SKY):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(service.close, 0)
        with pytest.raises(asyncio.CancelledError):
            await second
        encoding.may_go.set()
        with pytest.raises(QueueClosed):
            await first
        assert encoding.asked == ["slow"]

    run(test())


def test_a_large_body_is_decoded_while_the_event_loop_goes_on(service: Service) -> None:
    """A body of megabytes takes tenths of a second, in which nobody else would be answered."""
    has_begun, did_go_on, found = threading.Event(), threading.Event(), []

    def read(body: bytes, model: ServedModel) -> ScoringRequest:
        has_begun.set()
        found.append(did_go_on.wait(SECONDS))
        raise InvalidRequest("enough is known")

    async def test() -> None:
        options = ServerOptions()
        endpoint = ScoringEndpoint(replace(ROUTES[0], read=read), Gate(service, options, keys=None))
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": []}
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}".ljust(2**16 + 1)}

        async def send(message: Message) -> None:
            sent.append(message)

        answered = asyncio.ensure_future(endpoint(scope, receive, send))
        while not has_begun.is_set():
            await asyncio.sleep(0.001)
        did_go_on.set()
        await answered
        assert sent[0]["status"] == 422

    run(test())
    assert found == [True]
