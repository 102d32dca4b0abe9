"""Serve one model at a time: open it, check it, score with it, put another in its place, and end well.

Knows nothing of HTTP. `load` and `close` block; `score` is called in the event loop, and blocks nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from cappy_engine.batching import EncodedPairs, Ids, Scores
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.errors import (
    BundleError,
    CappyError,
    DeadlinePassed,
    InvalidRequest,
    ModelBroken,
    NotReady,
    PrecisionUnavailable,
    QueueClosed,
    ScoringError,
)
from cappy_engine.options import ScorerOptions
from cappy_engine.ranking import near_best
from cappy_engine.scored import Scored
from cappy_engine.scorer import Scorer
from cappy_engine.serving.jobs import Job, Model
from cappy_engine.serving.metrics import Metrics
from cappy_engine.serving.queue import Place, QueueLimits, ScoringQueue, Step
from cappy_engine.serving.ready_check import check_scores, find_canary
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, ServedModel, Stages
from cappy_engine.serving.server_options import ServerOptions

State = Literal["loading", "ready", "draining", "broken"]
STEPS_THAT_WAIT = 4
BATCHES_OF_A_WORKER = 2
"""Measured on two cores: a step of one batch for each costs 4% of throughput, of two 2%, and of four nothing; what
comes meanwhile waits for it."""
ENCODERS = 2
"""Threads that tokenise: one request's long texts must not keep the others' waiting."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Waiting:
    """The pairs of a request, of which each distinct one waits once; `places` are theirs among these, (n,) int64."""

    encoded: EncodedPairs
    places: Ids
    job: Job

    async def scores(self) -> Scores:
        """Wait for the scores of all pairs. Raises what made the job fail, with the index of the pair."""
        try:
            found = await asyncio.wrap_future(self.job.future)
        except ScoringError as error:
            if error.index is None:
                raise
            raise ScoringError(error.problem, int((self.places == error.index).argmax())) from error
        return found[self.places]


class LoadedModel:
    """A model at work: its scorer, which passed the canary, and its queue."""

    def __init__(
        self,
        bundle: str | Path,
        options: ScorerOptions,
        server: ServerOptions,
        metrics: Metrics,
        on_broken: Callable[[LoadedModel, ModelBroken], None],
    ) -> None:
        self.scorer = Scorer.open_with(bundle, options)
        self.max_text_chars = options.max_text_chars
        self._metrics = metrics
        info = self.scorer.info
        own_name = "cappy-mini" if bundle == EMBEDDED else Path(bundle).absolute().name
        self.card = ServedModel(server.model_names or (own_name,), info.device, info.precision, info.max_length)
        try:
            self._canary = find_canary(open_bundle(bundle), info, self.scorer.encode)
            self._check()
        except CappyError:
            self.scorer.close()
            raise
        workers = self.scorer.runner.workers
        batches = BATCHES_OF_A_WORKER * workers if workers > 1 else 1
        step_tokens = server.step_tokens or info.max_batch_tokens * batches
        most_tokens = server.max_queue_tokens or STEPS_THAT_WAIT * step_tokens
        self.queue = ScoringQueue(
            self._run,
            QueueLimits(server.max_queue_pairs, most_tokens, step_tokens, workers),
            check=self._check,
            on_step=self._count,
            on_broken=partial(on_broken, self),
        )

    def margin(self) -> float:
        """Tell how far below the best score fp32's winner may be. Raises InvalidRequest without an fp32 model."""
        try:
            return self.scorer.exact.margin()
        except PrecisionUnavailable as error:
            problem = f"exact_winner needs an fp32 model, and this server's bundle has none for {self.card.device}"
            raise InvalidRequest(problem) from error

    @property
    def has_exact_winner(self) -> bool:
        """Tell if the bundle has an fp32 model beside this one, for `exact_winner`."""
        try:
            return self.scorer.exact.margin() > 0
        except BundleError:
            return False

    def submit(self, request: ScoringRequest, place: Place, deadline: float) -> Waiting:
        """Tokenise the pairs of a request and let them wait; blocks for as long as that takes."""
        encoded = self.scorer.encode(request.pairs, too_long=request.too_long)
        distinct, places = encoded.distinct()
        return Waiting(encoded, places, place.submit(distinct, deadline=deadline))

    def close(self, wait_seconds: float | None = None) -> bool:
        """Answer what waits, and free the model; returns False if something was left unanswered."""
        is_done = self.queue.close(wait_seconds=wait_seconds)
        self.scorer.close()
        return is_done

    def _run(self, model: Model, encoded: EncodedPairs, is_alone: bool) -> Scores:
        if model == "exact":
            return self.scorer.exact.run(encoded)
        runner = self.scorer.runner
        return runner.run(encoded) if is_alone else runner.run_beside(encoded)

    def _check(self) -> None:
        """Raise ModelBroken unless the model scores the canary right, in both ways in which it runs."""
        check_scores(self._canary, self.scorer.runner.run)
        check_scores(self._canary, self.scorer.runner.run_beside)

    def _count(self, step: Step) -> None:
        runner = self.scorer.runner
        computed = int(step.lengths.sum())
        if runner.grouping.padding == "allowed" or runner.grouping.buckets:
            computed = sum(batch.padded_tokens for batch in runner.plan(step.lengths).batches)
        self._metrics.stepped(step, self.scorer.info, computed)


class Service:
    """Scores requests with the model of a bundle; another one takes its place when `load` is called again.

    `on_broken` is called, from a thread of its own, when the model gives no right scores any more.
    """

    def __init__(
        self,
        bundle: str | Path,
        options: ScorerOptions,
        server: ServerOptions,
        *,
        metrics: Metrics,
        on_broken: Callable[[ModelBroken], None] = lambda error: None,
    ) -> None:
        self.state: State = "loading"
        self.metrics = metrics
        self._bundle = bundle if bundle == EMBEDDED else Path(bundle).absolute()  # whoever changes the folder
        self._options = options
        self._server = server
        self.on_broken = on_broken
        self._model: LoadedModel | None = None
        self._loading = threading.Lock()
        self._encoders = ThreadPoolExecutor(ENCODERS, "cappy-tokenize")
        metrics.watch("queue_pairs", "pairs that wait", lambda: self._waiting()[0])
        metrics.watch("queue_tokens", "tokens that wait", lambda: self._waiting()[1])
        metrics.watch("ready", "1 if requests are answered", lambda: self.state == "ready")

    @property
    def model(self) -> LoadedModel:
        """Give the model that answers now. Raises NotReady."""
        if self._model is None:
            raise NotReady("the model is still being loaded; send the request again in a moment")
        return self._model

    def load(self) -> None:
        """Open the bundle, check it, and answer with it from now on; what another one accepted is answered by that.

        Raises what `Scorer.open` raises, ModelBroken for wrong scores, and BundleError where the bundle records none;
        then nothing changes.
        """
        with self._loading:
            fresh = LoadedModel(self._bundle, self._options, self._server, self.metrics, self._break)
            old, self._model = self._model, fresh
            if self.state in ("loading", "broken"):
                self.state = "ready"
            if old is not None:
                old.close()

    async def score(self, request: ScoringRequest, request_id: str) -> ScoringResult:
        """Score the pairs of a request.

        Raises InvalidRequest for too many pairs, InvalidPair, QueueFull, QueueClosed, DeadlinePassed, NotReady,
        ScoringError and ModelBroken. Where the call is cancelled, what waits
        is not scored.
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

    def drain(self) -> None:
        """Say that this server stops; what comes is still answered."""
        if self.state == "ready":
            self.state = "draining"

    def close(self) -> bool:
        """Answer what was accepted, within the time for it; returns False if something was left unanswered."""
        self.drain()
        with self._loading:
            is_done = self._model is None or self._model.close(self._server.drain_seconds)
        self._encoders.shutdown(wait=False)
        return is_done

    async def _score(self, request: ScoringRequest, request_id: str) -> ScoringResult:
        started = time.monotonic()
        deadline = started + self._server.request_seconds
        model, room = self._reserve(len(request.pairs))
        with room as place:
            margin = model.margin() if request.exact_winner else 0.0
            waiting = await asyncio.get_running_loop().run_in_executor(
                self._encoders, model.submit, request, place, deadline
            )
            scores = await waiting.scores()
            exact: dict[int, float] = {}
            near = near_best(scores, margin) if margin and len(scores) else []
            if len(near) > 1:
                again = place.submit(waiting.encoded.chosen(near), deadline=deadline, model="exact")
                exact = dict(zip(near, (await asyncio.wrap_future(again.future)).tolist(), strict=True))
        ended = time.monotonic()
        submitted, began = waiting.job.submitted, waiting.job.started or waiting.job.submitted
        stages = Stages(submitted - started, began - submitted, ended - began, ended - started)
        encoded = waiting.encoded
        self._count(encoded, stages)
        scored = Scored(scores, encoded.lengths, encoded.truncated, encoded.without_instruction)
        return ScoringResult(scored, model.card, request_id, int(time.time()), exact, stages)

    def _reserve(self, pairs: int) -> tuple[LoadedModel, Place]:
        """Get room in the queue of the model that answers now."""
        while True:
            model = self.model
            try:
                return model, model.queue.reserve(pairs)
            except QueueClosed:
                if model is self._model:
                    raise

    def _count(self, encoded: EncodedPairs, stages: Stages) -> None:
        for stage, seconds in stages.items():
            self.metrics.staged(stage, seconds)
        if truncated := int(np.count_nonzero(encoded.truncated)):
            self.metrics.truncated(truncated)

    def _break(self, model: LoadedModel, error: ModelBroken) -> None:
        log.error("%s", error)
        if model is self._model:
            self.state = "broken"
            self.on_broken(error)

    def _waiting(self) -> tuple[int, int]:
        return (0, 0) if self._model is None else self._model.queue.waiting()
