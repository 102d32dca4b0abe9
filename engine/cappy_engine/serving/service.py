"""Serve one model at a time: open it, check it, score with it, put another in its place, and end well.

Knows nothing of HTTP. `load` and `close` block; `score` is called in the event loop, and blocks nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from cappy_engine.bundle import EMBEDDED
from cappy_engine.errors import (
    DeadlinePassed,
    InvalidRequest,
    ModelBroken,
    NotReady,
    QueueClosed,
    ScoringError,
)
from cappy_engine.options import ScorerOptions
from cappy_engine.ranking import near_best
from cappy_engine.scored import Scored
from cappy_engine.serving.loaded import LoadedModel, scores_of_job
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.queue import Reservation
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, Stages
from cappy_engine.serving.server_options import ServerOptions

Done = TypeVar("Done")
State = Literal["loading", "ready", "draining", "broken"]
LONG_CHARS = 2**16
"""Requests of more characters are tokenised by a thread of their own, so that others do not wait for them."""
HANGING = 10
"""A run that takes so many times `request_seconds` hangs. Shorter ones may come to an end."""
log = logging.getLogger(__name__)


class Service:
    """Scores requests with the model of a bundle; another one takes its place when `load` is called again.

    `on_broken`, which may be set, is called when the model gives no right scores any more, from a thread of its own.
    """

    def __init__(
        self,
        bundle: str | Path,
        options: ScorerOptions,
        server: ServerOptions,
        *,
        metrics: Metrics,
    ) -> None:
        self._state: State = "loading"
        self.metrics = metrics
        self.bundle = bundle if bundle == EMBEDDED else Path(bundle).absolute()  # whoever changes the folder
        self._options = options
        self._server = server
        self.on_broken: Callable[[ModelBroken], None] = lambda error: None
        self._model: LoadedModel | None = None
        self._is_stopping = False
        self._changing = threading.Lock()
        self._leaving: list[threading.Thread] = []
        self._reader = ThreadPoolExecutor(1, "cappy-read")
        self._encoder = ThreadPoolExecutor(1, "cappy-tokenize")
        self._long_encoder = ThreadPoolExecutor(1, "cappy-tokenize-long")
        metrics.watch("queue_pairs", "pairs that wait", lambda: self._waiting()[0])
        metrics.watch("queue_tokens", "tokens that wait", lambda: self._waiting()[1])
        metrics.watch("queue_pairs_limit", "pairs that may wait", lambda: self._limits()[0])
        metrics.watch("queue_tokens_limit", "tokens that may wait", lambda: self._limits()[1])
        metrics.watch("encoding_chars", "characters that become tokens", self._encoding_chars)
        metrics.watch("ready", "1 if requests are answered", lambda: self.state == "ready")

    @property
    def state(self) -> State:
        """Tell how it is: "broken" also where a step runs longer than any request may wait."""
        model = self._model
        if self._state == "ready" and model and model.queue.running_seconds() > self._server.request_seconds:
            return "broken"
        return self._state

    def find_hanging(self, awake_seconds: float) -> ModelBroken | None:
        """Find that a run of the model hangs: then nobody is answered any more.

        The process has been running for `awake_seconds` without a stop, as by SIGSTOP: so long the run may have had.
        """
        model, most = self._model, HANGING * self._server.request_seconds
        if model is None or min(model.queue.running_seconds(), awake_seconds) <= most:
            return None
        self._state = "broken"
        return ModelBroken(f"a run of the model has not ended in {most:g} seconds; the server must be started again")

    @property
    def model(self) -> LoadedModel:
        """Give the model that answers now. Raises NotReady."""
        if self._model is None:
            raise NotReady("the model is still being loaded; send the request again in a moment")
        return self._model

    def load(self) -> bool:
        """Open the bundle, check it, and answer with it from now on; the old model answers what it accepted.

        Returns False where the server stops meanwhile: then the model is not used. Raises what `Scorer.open` raises,
        ModelBroken for wrong scores, and BundleError where the bundle records none; then nothing changes.
        """
        for thread in self._leaving:  # so that two models are in memory, and not three
            thread.join(self._server.request_seconds)
        fresh = LoadedModel(self.bundle, self._options, self._server, self.metrics, self._break)
        with self._changing:
            leaves = fresh if self._is_stopping else self._model
            if not self._is_stopping:
                self._model = fresh
                self._state = "ready"
                self.metrics.answers_with(fresh.card, fresh.manifest_sha256)
            self._leaving = [thread for thread in self._leaving if thread.is_alive()]
            if leaves is not None:  # closed by a thread of its own: a run that hangs would keep this one
                thread = threading.Thread(target=leaves.close, name="cappy-leave", daemon=True)
                try:
                    thread.start()
                    self._leaving.append(thread)
                except RuntimeError as error:  # no more threads can be started
                    log.warning("the old model is not freed: %s", error)
        return leaves is not fresh

    async def score(self, request: ScoringRequest, request_id: str) -> ScoringResult:
        """Score the pairs of a request.

        Raises InvalidRequest for too many pairs, InvalidPair, QueueFull, QueueClosed, DeadlinePassed, NotReady,
        ScoringError and ModelBroken. Where the call is cancelled, what waits is not scored.
        """
        if len(request.pairs) > self._server.max_pairs:
            raise InvalidRequest(
                f"{len(request.pairs)} pairs in one request, and at most {self._server.max_pairs} are taken; send "
                "several requests",
                413,
            )
        try:
            async with asyncio.timeout(self._server.request_seconds):
                return await self._score(request, request_id)
        except TimeoutError as error:
            raise DeadlinePassed(
                f"the request was not answered in {self._server.request_seconds:g} seconds; send it again later, or "
                "less at once"
            ) from error

    async def aside(self, work: Callable[[], Done]) -> Done:
        """Do long work in a thread, such as reading a large request. The event loop may not stand still so long."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def drain(self) -> None:
        """Say that this server stops; what comes is still answered, and no other model is loaded."""
        with self._changing:
            self._is_stopping = True
            if self._state != "broken":
                self._state = "draining"

    def close(self, wait_seconds: float | None = None) -> None:
        """Answer accepted requests for at most `wait_seconds`, and free the models.

        A model is freed when its last run has ended. A model that is being loaded is not waited for.
        """
        self.drain()
        if self._model is not None:
            self._model.close(wait_seconds)
        with self._changing:  # all of them are started then
            leaving = list(self._leaving)
        for thread in leaving:
            thread.join()
        for threads in (self._reader, self._encoder, self._long_encoder):
            threads.shutdown(wait=False, cancel_futures=True)

    async def _score(self, request: ScoringRequest, request_id: str) -> ScoringResult:
        started = time.monotonic()
        deadline = started + self._server.request_seconds
        chars = sum(map(len, {text for pair in request.pairs for text in pair}))
        model, room = self._reserve(request, chars)
        encoder = self._encoder if chars <= LONG_CHARS else self._long_encoder
        with room:
            reach = model.reach() if request.exact_winner else 0.0
            waiting = await asyncio.wrap_future(model.score(request, room, deadline, encoder))
            scores = waiting.scores()
            exact: dict[int, float] = {}
            near = near_best(scores, reach) if reach and len(scores) else []
            if len(near) > 1:
                await asyncio.get_running_loop().run_in_executor(self._long_encoder, model.open_exact)
                job = room.submit(waiting.encoded.chosen(near), deadline=deadline, model="exact")
                with contextlib.suppress(ScoringError):  # told with its place by `scores_of_job`
                    await asyncio.wrap_future(job.future)
                exact = dict(zip(near, scores_of_job(job, near.__getitem__).tolist(), strict=True))
        ended = time.monotonic()
        submitted, began = waiting.job.submitted, waiting.job.started or waiting.job.submitted
        stages = Stages(submitted - started, began - submitted, ended - began, ended - started)
        encoded = waiting.encoded
        scored = Scored(scores, encoded.lengths, encoded.truncated, encoded.without_instruction)
        return ScoringResult(scored, model.card, request_id, int(time.time()), exact, stages)

    def _reserve(self, request: ScoringRequest, chars: int) -> tuple[LoadedModel, Reservation]:
        """Get room in the queue of the model that answers now."""
        while True:
            model = self.model
            try:
                return model, model.reserve(request, chars)
            except QueueClosed:
                if model is self._model:
                    raise

    def _break(self, model: LoadedModel, error: ModelBroken) -> None:
        log.error("%s", error)
        if model is self._model:
            self._state = "broken"
            self.on_broken(error)

    def _waiting(self) -> tuple[int, int]:
        return (0, 0) if self._model is None else self._model.queue.waiting()

    def _limits(self) -> tuple[int, int]:
        limits = None if self._model is None else self._model.queue.limits
        return (limits.max_pairs, limits.max_tokens) if limits else (0, 0)

    def _encoding_chars(self) -> int:
        return 0 if self._model is None else self._model.queue.encoding_chars()
