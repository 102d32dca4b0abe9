"""Batch the requests of many clients for one model: a bounded queue, and the thread that owns the dispatcher.

Requests wait as tokens. A step is cut the moment the model is free for it (`jobs`): no timer, no waiting when idle. A
request may take several steps. If all that waits fits into one step, it runs alone, on everything there is. If more
waits, each of the dispatcher's workers gets a step of its own, and the next one as soon as it is free.

A request leaves the queue when its client has gone or its deadline has passed. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import CappyError, DeadlinePassed, ModelBroken, QueueClosed
from cappy_engine.serving.jobs import Held, Job, Model, NextStep, QueueLimits, Step, cut_step
from cappy_engine.serving.steps import score_parts

Run = Callable[[Model, EncodedPairs, bool], Scores]
"""Scores encoded pairs with one of the models: alone, or (False) beside other runs."""

log = logging.getLogger(__name__)

NICE = 5
"""With it, throughput under twice the load was 7% better on two cores."""
STOPPED = "the server stopped before this request was answered; send it again"


class Reservation:
    """Room in the queue for a request: for its `pairs`, and its `chars` until they are tokens, about `tokens`.

    While a request has one, the queue is not closed for good, and takes all that the request submits. If the block that
    it guards is left by an exception, what was not answered is given up.
    """

    def __init__(self, queue: ScoringQueue, pairs: int, chars: int, tokens: int) -> None:
        self.pairs = pairs
        self.chars = chars
        self.tokens = tokens
        self.jobs: list[Job] = []
        self._queue = queue

    def submit(
        self,
        encoded: EncodedPairs,
        *,
        deadline: float = math.inf,
        model: Model = "chosen",
        on_done: Callable[[Job], object] = lambda job: None,
    ) -> Job:
        """Let encoded pairs wait until `deadline`, in seconds of `time.monotonic`; raises QueueFull and QueueClosed.

        `on_done` is called, from any thread, when they are scored or have failed.
        """
        job = Job(encoded, model, deadline)
        job.future.add_done_callback(lambda done: on_done(job))
        if len(encoded):
            self._queue._enter(self, job)
        else:
            job.succeed()
        return job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._queue._leave(self)
        for job in self.jobs if kind is not None else ():
            job.future.cancel()


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
        self._jobs: dict[Job, None] = {}  # in the order in which they came
        self._held = Held()
        self._reservations: set[Reservation] = set()
        self._running: dict[int, float] = {}
        self._is_alone = False
        self._is_closed = self._is_over = False
        self._tokens_per_second = 0.0
        self._workers = ThreadPoolExecutor(limits.workers, "cappy-step", initializer=_give_way)
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._work, name="cappy-queue", daemon=True)
        self._thread.start()

    def reserve(self, pairs: int, chars: int = 0, expected_tokens: int = 0) -> Reservation:
        """Keep room for the pairs of a request, before they are tokenised. Raises QueueFull and QueueClosed.

        QueueFull also where `expected_tokens` do not fit; the real ones are counted when they are submitted.

        >>> with queue.reserve(len(pairs)) as reservation:
        ...     job = reservation.submit(scorer.encode(pairs))
        >>> job.future.result()
        array([0.93, 0.08], dtype=float32)
        """
        with self._changed:
            if self._is_closed:
                raise QueueClosed("this server is stopping; send the request to another one, or later")
            self._held.check(self.limits, pairs, expected_tokens, chars, self._tokens_per_second)
            reservation = Reservation(self, pairs, chars, expected_tokens)
            self._reservations.add(reservation)
            self._held.reserved_pairs += pairs
            self._held.reserved_chars += chars
            self._held.reserved_tokens += expected_tokens
        return reservation

    def waiting(self) -> tuple[int, int]:
        """Count the pairs and the tokens that wait."""
        with self._changed:
            return self._held.waiting_pairs, self._held.waiting_tokens

    def encoding_chars(self) -> int:
        """Count the characters that are becoming tokens."""
        with self._changed:
            return self._held.reserved_chars

    def running_seconds(self) -> float:
        """Tell for how long the oldest step has been running; 0 if none is."""
        with self._changed:
            return time.monotonic() - min(self._running.values()) if self._running else 0.0

    def close(self, *, wait_seconds: float | None = None) -> bool:
        """Take no more requests, and wait until the others are answered; returns if they are.

        After `wait_seconds` what is left fails with QueueClosed.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            is_done = self._changed.wait_for(lambda: not self._jobs and not self._reservations, wait_seconds)
            self._end(QueueClosed(STOPPED))
        self._thread.join(wait_seconds)
        return is_done

    def _end(self, error: CappyError) -> None:
        """Have all that wait fail; whoever is still tokenising comes too late."""
        self._is_closed = self._is_over = True
        for reservation in list(self._reservations):
            self._leave(reservation)
        for job in list(self._jobs):
            job.fail(error)
        self._changed.notify_all()

    def _enter(self, reservation: Reservation, job: Job) -> None:
        with self._changed:
            if reservation not in self._reservations:  # the queue is over, or the client gave the request up
                raise QueueClosed(STOPPED)
            pairs = reservation.pairs
            self._give_up(reservation)
            if pairs:
                self._held.check(self.limits, len(job.encoded), job.tokens_left, 0, self._tokens_per_second)
            reservation.jobs.append(job)
            self._jobs[job] = None
            self._held.waiting_pairs += job.pairs_left
            self._held.waiting_tokens += job.tokens_left
            job.future.add_done_callback(lambda done: self._forget(job))
            self._changed.notify_all()

    def _leave(self, reservation: Reservation) -> None:
        with self._changed:
            self._give_up(reservation)
            self._reservations.discard(reservation)
            self._changed.notify_all()

    def _give_up(self, reservation: Reservation) -> None:
        """Take back what a reservation keeps for pairs that are not submitted."""
        if reservation in self._reservations:
            self._held.reserved_pairs -= reservation.pairs
            self._held.reserved_chars -= reservation.chars
            self._held.reserved_tokens -= reservation.tokens
            reservation.pairs = reservation.chars = reservation.tokens = 0

    def _forget(self, job: Job) -> None:
        """Let go of a job that was answered or given up."""
        with self._changed:
            if job in self._jobs:
                del self._jobs[job]
                self._held.waiting_pairs -= job.pairs_left
                self._held.waiting_tokens -= job.tokens_left
                self._changed.notify_all()

    def _work(self) -> None:
        """Run steps that are alone, and hand the others to the workers. End when the queue is closed and empty."""
        try:
            while step := self._next_step():
                if step.is_alone:
                    self._run_step(step)
                else:
                    self._workers.submit(self._run_step, step)
        except Exception as error:  # no more threads can be started, or a fault of ours: nobody would be answered
            log.exception("the queue failed")
            self._break(ModelBroken(f"the queue failed: {error}"))
        self._workers.shutdown(wait=False)

    def _next_step(self) -> NextStep | None:
        """Wait for requests and a worker, and cut a step. None where the queue is over."""
        with self._changed:
            while True:
                self._drop_late()
                if self._held.waiting_pairs and not self._is_alone and len(self._running) < self.limits.workers:
                    return self._cut()
                if self._is_closed and not (self._jobs or self._reservations or self._running):
                    return None
                self._changed.wait()

    def _cut(self) -> NextStep:
        self._is_alone = self.limits.workers == 1 or (self._fits() and not self._running)
        tokens = self.limits.step_tokens if self._is_alone else self.limits.share(self._held.waiting_tokens)
        parts = cut_step(self._jobs, tokens)
        lengths = np.concatenate([part.job.encoded.lengths[part.rows] for part in parts])
        self._held.waiting_pairs -= len(lengths)
        self._held.waiting_tokens -= int(lengths.sum())
        step = NextStep(parts, lengths, self._is_alone)
        started = self._running[id(step)] = time.monotonic()
        for part in parts:
            part.job.started = part.job.started or started
        return step

    def _fits(self) -> bool:
        """Tell if one step takes all that waits."""
        return self._held.waiting_tokens <= self.limits.step_tokens

    def _run_step(self, step: NextStep) -> None:
        started = time.monotonic()
        model = step.parts[0].job.model
        try:
            score_parts(lambda encoded: self._run(model, encoded, step.is_alone), step.parts, self._check)
        except ModelBroken as error:
            self._break(error)
        except Exception as error:
            log.exception("a step failed")
            self._break(ModelBroken(f"a step failed: {type(error).__name__}: {error}"))
        share = 1.0 if step.is_alone else 1 / self.limits.workers
        done = Step(model, step.lengths, len(step.parts), time.monotonic() - started, share)
        for job in {part.job for part in step.parts}:  # first: its client waits
            if job.is_scored:
                job.succeed()
        self._finish(step, done)
        self._on_step(done)

    def _drop_late(self) -> None:
        """Have the requests fail whose time is over."""
        now = time.monotonic()
        for job in [job for job in self._jobs if job.deadline <= now]:
            job.fail(DeadlinePassed("the request waited longer than it may; send it again later, or less at once"))

    def _finish(self, step: NextStep, done: Step) -> None:
        rate = int(done.lengths.sum()) / max(done.seconds, 1e-6) / done.workers
        with self._changed:
            del self._running[id(step)]
            self._is_alone = False
            self._tokens_per_second += (rate - self._tokens_per_second) * (0.2 if self._tokens_per_second else 1.0)
            self._changed.notify_all()

    def _break(self, error: ModelBroken) -> None:
        with self._changed:
            if self._is_over:  # what runs when the model is freed fails
                return
            self._is_closed = self._is_over = True
        self._on_broken(error)  # before a client hears of it
        with self._changed:
            self._end(error)


def _give_way() -> None:
    """Let the threads that read and answer requests go first, if threads have priorities here."""
    if sys.platform == "linux":  # elsewhere the number of a thread may be that of another process
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
