"""Batch the requests of many clients for one model: a bounded queue, and the thread that owns the runner.

Requests wait as tokens. A step is cut the moment the model is free for it (`jobs`): no timer, no waiting when idle. A
request may take several steps.

If all that waits fits into one step, it runs alone, on everything there is. If more waits, each of the runner's workers
gets a step of its own, and the next one as soon as it is free: none waits for the others.

What its client has given up, or its deadline has passed, leaves the queue before the next step. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np

from cappy_engine.batching import EncodedPairs, Ids, Scores
from cappy_engine.errors import CappyError, DeadlinePassed, ModelBroken, QueueClosed, QueueFull
from cappy_engine.serving.jobs import Job, Model, Part, cut_step
from cappy_engine.serving.steps import score_parts

Run = Callable[[Model, EncodedPairs, bool], Scores]
"""Scores encoded pairs with one of the models: alone, or (False) beside other runs."""

STOPPED = "the server stopped before this request was answered; send it again"


@dataclass(frozen=True)
class QueueLimits:
    """At most `max_pairs` and `max_tokens` wait; a request that is larger than that is taken where nothing else waits.

    A step takes `step_tokens` of them if it runs alone. Beside others, it takes the share of one of the `workers`.
    """

    max_pairs: int
    max_tokens: int
    step_tokens: int
    workers: int = 1


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
    """Scores what is submitted to it, in steps, with threads of its own.

    `run` scores encoded pairs with one of the models, in as many threads as there are workers. `check` raises
    ModelBroken if the model is at fault; it is asked after a failure that no pair explains. `on_step` gets every step.
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
        self._running = 0
        self._is_alone = False
        self._tokens_per_second = 0.0
        self._workers = ThreadPoolExecutor(limits.workers, "cappy-step")
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
            if place not in self._places:  # the queue is over, or the client gave the request up
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
        """Run steps that are alone, and hand the others to the workers, until the queue is closed and empty."""
        while step := self._next_step():
            parts, is_alone = step
            if is_alone:
                self._run_step(parts, is_alone)
            else:
                self._workers.submit(self._run_step, parts, is_alone)
        self._workers.shutdown(wait=False)

    def _next_step(self) -> tuple[list[Part], bool] | None:
        """Wait for requests and a worker, and cut a step; tells if it runs alone. None where the queue is over."""
        with self._changed:
            while True:
                self._drop()
                waiting = [job for job in self._jobs if job.pairs_left]
                if waiting and not self._is_alone and self._running < self.limits.workers:
                    tokens = sum(job.tokens_left for job in waiting)
                    is_alone = self.limits.workers == 1 or (not self._running and tokens <= self.limits.step_tokens)
                    self._running += 1
                    self._is_alone = is_alone
                    share = self.limits.step_tokens // (1 if is_alone else self.limits.workers)
                    return cut_step(waiting, max(1, share)), is_alone
                if self._is_closed and not (self._jobs or self._places or self._running):
                    return None
                self._changed.wait()

    def _run_step(self, parts: Sequence[Part], is_alone: bool) -> None:
        started = time.monotonic()
        for part in parts:
            part.job.started = part.job.started or started
        model = parts[0].job.model
        try:
            if not score_parts(lambda encoded: self._run(model, encoded, is_alone), parts):
                self._check()
        except ModelBroken as error:
            self._break(error)
        finally:
            lengths = np.concatenate([part.job.encoded.lengths[part.rows] for part in parts])
            step = Step(model, lengths, len(parts), time.monotonic() - started)
            self._finish(parts, step)
        self._on_step(step)

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

    def _finish(self, parts: Sequence[Part], step: Step) -> None:
        rate = int(step.lengths.sum()) / max(step.seconds, 1e-6) * (1 if self._is_alone else self.limits.workers)
        with self._changed:
            self._running -= 1
            self._is_alone = False
            self._tokens_per_second += (rate - self._tokens_per_second) * (0.2 if self._tokens_per_second else 1.0)
            for job in {part.job for part in parts}:
                job.scored += sum(len(part.rows) for part in parts if part.job is job)
                if job.scored == len(job.encoded):
                    job.succeed()
            self._drop()
            self._changed.notify_all()

    def _break(self, error: ModelBroken) -> None:
        with self._changed:
            if self._is_over:  # what runs when the model is freed fails
                return
            self._end(error)
        self._on_broken(error)
