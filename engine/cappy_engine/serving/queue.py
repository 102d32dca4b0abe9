"""Batch the requests of many clients for one model: a bounded queue, and the one thread that owns the runner.

Requests wait as tokens. A step is cut the moment the model is free (`jobs`): no timer, no waiting when idle. A request
may take several steps.

What its client has given up, or its deadline has passed, leaves the queue before the next step. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from cappy_engine.batching import EncodedPairs, Ids, Scores
from cappy_engine.errors import CappyError, DeadlinePassed, ModelBroken, QueueClosed, QueueFull, ScoringError
from cappy_engine.serving.jobs import Job, Model, Part, cut_step

Run = Callable[[Model, EncodedPairs], Scores]

log = logging.getLogger(__name__)

STOPPED = "the server stopped before this request was answered; send it again"


@dataclass(frozen=True)
class QueueLimits:
    """At most `max_pairs` and `max_tokens` wait; a step takes `step_tokens` of them.

    A request that is larger than that is taken where nothing else waits.
    """

    max_pairs: int
    max_tokens: int
    step_tokens: int


@dataclass(frozen=True)
class Step:
    """What one run held: the `lengths` of its pairs (n,) int64, the requests they came from, and how long it took."""

    model: Model
    lengths: Ids
    requests: int
    seconds: float


class Place:
    """Room in the queue for the `pairs` of a request, from before they are tokenised until they are submitted.

    Who has a place has been let in: until it is left, the queue is not closed for good, and takes what is submitted
    after the first pairs too.
    """

    def __init__(self, queue: ScoringQueue, pairs: int) -> None:
        self.pairs = pairs
        self._queue = queue

    def submit(self, encoded: EncodedPairs, *, deadline: float = math.inf, model: Model = "chosen") -> Job:
        """Let encoded pairs wait until `deadline`, in seconds of `time.monotonic`; raises QueueFull and QueueClosed."""
        job = Job(encoded, model, deadline)
        if len(encoded):
            self._queue._enter(self, job)
        else:
            job.succeed()
        return job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._queue._leave(self)


class ScoringQueue:
    """Scores what is submitted to it, in steps, with a thread of its own.

    `run` scores encoded pairs with one of the models. `check` raises ModelBroken if the model is at fault; it is asked
    after a failure that no pair explains. `on_step` gets every step.
    """

    def __init__(
        self,
        run: Run,
        limits: QueueLimits,
        *,
        check: Callable[[], None] = lambda: None,
        on_step: Callable[[Step], None] = lambda step: None,
        on_broken: Callable[[ModelBroken], None] = lambda error: None,
    ) -> None:
        self.limits = limits
        self._run = run
        self._check = check
        self._on_step = on_step
        self._on_broken = on_broken
        self._jobs: list[Job] = []
        self._places: set[Place] = set()
        self._is_closed = False
        self._is_over = False
        self._tokens_per_second = 0.0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="cappy-queue", daemon=True)
        self._thread.start()

    def reserve(self, pairs: int) -> Place:
        """Keep room for the pairs of a request, before they are tokenised. Raises QueueFull and QueueClosed.

        >>> with queue.reserve(len(pairs)) as place:
        ...     job = place.submit(scorer.encode(pairs))
        >>> job.future.result()
        array([0.93, 0.08], dtype=float32)
        """
        with self._changed:
            if self._is_closed:
                raise QueueClosed("this server is stopping; send the request to another one, or later")
            self._drop()
            self._check_room(pairs, 0)
            place = Place(self, pairs)
            self._places.add(place)
        return place

    def waiting(self) -> tuple[int, int]:
        """Count the pairs and the tokens that wait."""
        with self._changed:
            return self._waiting()

    def close(self, *, wait_seconds: float | None = None) -> bool:
        """Take no more requests, and wait until the others are answered; returns if they are.

        After `wait_seconds` what is left fails with QueueClosed.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_done = self._changed.wait_for(lambda: not self._jobs and not self._places, wait_seconds)
            self._end(QueueClosed(STOPPED))
        self._thread.join(wait_seconds)
        return is_done

    def _end(self, error: CappyError) -> None:
        """Have all that wait fail; whoever is still tokenising comes too late."""
        self._is_closed = self._is_over = True
        self._places.clear()
        for job in self._jobs:
            job.fail(error)
        self._changed.notify_all()

    def _enter(self, place: Place, job: Job) -> None:
        with self._changed:
            if self._is_over:
                raise QueueClosed(STOPPED)
            pairs, place.pairs = place.pairs, 0
            self._check_room(pairs, int(job.encoded.lengths.sum()))
            self._jobs.append(job)
            self._changed.notify_all()

    def _leave(self, place: Place) -> None:
        with self._changed:
            self._places.discard(place)
            self._changed.notify_all()

    def _waiting(self) -> tuple[int, int]:
        return sum(job.pairs_left for job in self._jobs), sum(job.tokens_left for job in self._jobs)

    def _check_room(self, pairs: int, tokens: int) -> None:
        waiting_pairs, waiting_tokens = self._waiting()
        taken = waiting_pairs + sum(place.pairs for place in self._places)
        is_over = taken + pairs > self.limits.max_pairs or waiting_tokens + tokens > self.limits.max_tokens
        if pairs and taken and is_over:
            seconds = waiting_tokens / self._tokens_per_second if self._tokens_per_second else 1
            raise QueueFull(
                f"the server is busy: {taken} pairs wait, with {waiting_tokens} tokens; {pairs} more do not fit. Send "
                "it again later",
                max(1, math.ceil(seconds)),
            )

    def _work(self) -> None:
        """Run steps until the queue is closed and empty."""
        while parts := self._next_step():
            started = time.monotonic()
            for part in parts:
                part.job.started = part.job.started or started
            self._score(parts)
            seconds = time.monotonic() - started
            self._finish(parts)
            lengths = np.concatenate([part.job.encoded.lengths[part.rows] for part in parts])
            rate = lengths.sum() / max(seconds, 1e-6)
            self._tokens_per_second += (rate - self._tokens_per_second) * (0.2 if self._tokens_per_second else 1.0)
            self._on_step(Step(parts[0].job.model, lengths, len(parts), seconds))

    def _next_step(self) -> list[Part]:
        """Wait for requests and cut a step of them; nothing if the queue is closed for good."""
        with self._changed:
            while True:
                self._drop()
                waiting = [job for job in self._jobs if job.pairs_left]
                if waiting:
                    return cut_step(waiting, self.limits.step_tokens)
                if self._is_closed and not self._places:
                    return []
                self._changed.wait()

    def _drop(self) -> None:
        """Forget the requests that nobody waits for any more."""
        now = time.monotonic()
        for job in self._jobs:
            if job.deadline <= now:
                job.fail(DeadlinePassed("the request waited longer than it may; send it again later, or less at once"))
        kept = [job for job in self._jobs if not job.future.done()]
        if len(kept) < len(self._jobs):
            self._jobs[:] = kept
            self._changed.notify_all()

    def _finish(self, parts: Sequence[Part]) -> None:
        with self._changed:
            for job in {part.job for part in parts}:
                if not job.pairs_left:
                    job.succeed()
            self._drop()

    def _score(self, parts: Sequence[Part]) -> None:
        """Score the parts; where that fails, only the guilty request does."""
        if self._is_over:  # the model broke, and all were told
            return
        encoded = EncodedPairs.joined([part.job.encoded.chosen(part.rows) for part in parts])
        try:
            scores = self._run(parts[0].job.model, encoded)
        except ScoringError as error:
            self._score_without_guilty(parts, error)
        except Exception as error:  # a fault of ours must not end the thread: nobody would ever be answered
            log.exception("a step failed")
            self._score_without_guilty(parts, ScoringError(f"{type(error).__name__}: {error}"))
        else:
            start = 0
            for part in parts:
                part.job.scores[part.rows] = scores[start : start + len(part.rows)]
                start += len(part.rows)

    def _score_without_guilty(self, parts: Sequence[Part], error: ScoringError) -> None:
        if error.index is not None:
            starts = np.cumsum([0, *(len(part.rows) for part in parts)])
            guilty = int(np.searchsorted(starts, error.index, side="right")) - 1
            place = int(parts[guilty].rows[error.index - starts[guilty]])
            parts[guilty].job.fail(ScoringError(error.problem, place))
            rest = [*parts[:guilty], *parts[guilty + 1 :]]
            if rest:
                self._score(rest)
        elif len(parts) > 1:
            for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :]):
                self._score(half)
        else:
            parts[0].job.fail(error)
            try:
                self._check()
            except ModelBroken as broken:
                self._break(broken)

    def _break(self, error: ModelBroken) -> None:
        with self._changed:
            self._end(error)
        self._on_broken(error)
