"""Models and sessions whose runs wait until they are let go, and requests of made-up tokens."""

from __future__ import annotations

import math
import threading

import numpy as np

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import ScoringError
from cappy_engine.serving.jobs import Job, Model
from cappy_engine.serving.queue import ScoringQueue
from cappy_engine.session import Inputs, Session

POISON = 666
SECONDS = 20


def pairs_of(*lengths: int, first_id: int = 1) -> EncodedPairs:
    """Pairs of these lengths, whose tokens are `first_id`."""
    ids = [np.full(length, first_id, dtype=np.int64) for length in lengths]
    zeros = [np.zeros(length, dtype=np.int64) for length in lengths]
    return EncodedPairs(ids, zeros, np.array(lengths, dtype=np.int64), np.zeros(len(lengths), dtype=np.bool_))


class Gated:
    """A model whose runs wait until they are let go; a pair's score is its first token plus its length / 1000.

    A pair of POISON fails. `is_broken` has all runs fail without a pair at fault.
    """

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.models: list[Model] = []
        self.is_broken = False
        self.error: Exception | None = None
        self._let = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def __call__(self, model: Model, encoded: EncodedPairs, is_alone: bool) -> Scores:
        self.steps.append(encoded.lengths.tolist())
        self.models.append(model)
        self._entered.release()
        assert self._let.acquire(timeout=SECONDS)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.is_broken:
            raise ScoringError("the device is gone")
        for place, ids in enumerate(encoded.token_ids):
            if ids[0] == POISON:
                raise ScoringError("this pair fails", place)
        return np.array([ids[0] + len(ids) / 1000 for ids in encoded.token_ids], dtype=np.float32)

    def let(self, runs: int = 1000) -> None:
        """Let runs go on."""
        self._let.release(runs)

    def wait(self) -> None:
        """Wait until a run has begun."""
        assert self._entered.acquire(timeout=SECONDS)


def submit(queue: ScoringQueue, encoded: EncodedPairs, deadline: float = math.inf, *, model: Model = "chosen") -> Job:
    """Let encoded pairs wait in a queue."""
    with queue.reserve(len(encoded)) as place:
        return place.submit(encoded, deadline=deadline, model=model)


def scores(job: Job) -> list[float]:
    """Wait for the scores of a job."""
    return [round(float(score), 3) for score in job.future.result(timeout=SECONDS)]


class Gate:
    """A session whose runs wait while the gate is closed, and fail when it is worn out."""

    device = "cpu"

    def __init__(self, session: Session) -> None:
        self.has_begun = threading.Event()
        self.is_open = threading.Event()
        self.is_open.set()
        self.is_worn = False
        self._session = session

    def run(self, inputs: Inputs) -> Scores:
        self.has_begun.set()
        assert self.is_open.wait(SECONDS)
        if self.is_worn:
            raise ScoringError("the device is gone")
        return self._session.run(inputs)
