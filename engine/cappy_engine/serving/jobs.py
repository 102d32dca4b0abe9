"""Cut the next step for the model from the requests that wait. Pure, but for the future that each of them holds.

Half of a step belongs to the oldest request, and the rest to the requests with the fewest tokens left. So a short
request does not wait for a long one to end, and a long one goes on however many short ones come.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np

from cappy_engine.batching import EncodedPairs, Ids, Scores
from cappy_engine.errors import CappyError

Model = Literal["chosen", "exact"]
"""The model that the scorer was opened with, or fp32 beside it."""
LOOKED_AT = 256
"""Requests of which a step is cut: the model must not wait while thousands are sorted."""


@dataclass(frozen=True)
class QueueLimits:
    """At most `max_pairs` and `max_tokens` wait, and `max_chars` characters become tokens.

    A larger request is taken where nothing else waits. A step takes `step_tokens` if it runs alone. Beside others, it
    takes the share of one of the `workers`.
    """

    max_pairs: int
    max_tokens: int
    step_tokens: int
    workers: int = 1
    max_chars: int = 2**62


@dataclass(eq=False)
class Job:
    """The pairs of one request that wait or run, longest first; `future` gets their scores, (n,) float32."""

    encoded: EncodedPairs
    model: Model
    deadline: float
    future: Future[Scores] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    taken: int = 0
    scored: int = 0

    def __post_init__(self) -> None:
        self.order = np.argsort(-self.encoded.lengths, kind="stable")
        self.tokens_until = np.cumsum(self.encoded.lengths[self.order])
        """The tokens of the pairs up to each, in that order."""
        self.scores = np.full(len(self.encoded), np.nan, dtype=np.float32)

    @property
    def pairs_left(self) -> int:
        """Count the pairs that no step has taken."""
        return len(self.order) - self.taken

    @property
    def tokens_left(self) -> int:
        """Count the tokens that no step has taken."""
        return int(self.tokens_until[-1] - (self.tokens_until[self.taken - 1] if self.taken else 0))

    def take(self, tokens: int) -> Ids:
        """Take the next pairs, of at most `tokens` tokens: their places."""
        before = int(self.tokens_until[self.taken - 1]) if self.taken else 0
        end = int(np.searchsorted(self.tokens_until, before + tokens, side="right"))
        rows: Ids = self.order[self.taken : end]
        self.taken = end
        return rows

    def put(self, rows: Ids, scores: Scores) -> None:
        """Take the scores of some pairs."""
        self.scores[rows] = scores
        self.scored += len(rows)

    def succeed(self) -> None:
        """Answer with the scores, unless the client gave the request up meanwhile."""
        self.ended = time.monotonic()
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(self.scores)

    def fail(self, error: CappyError) -> None:
        """Answer with an error, unless the request was answered or given up."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(frozen=True)
class Part:
    """The pairs of a job that a step takes."""

    job: Job
    rows: Ids


@dataclass(frozen=True, eq=False)
class NextStep:
    """The parts of a step that is to run, the lengths of their pairs, and whether it runs alone."""

    parts: list[Part]
    lengths: Ids
    is_alone: bool


@dataclass(frozen=True)
class Step:
    """What one run held: the `lengths` of its pairs (n,) int64, the requests they came from, and how long it took."""

    model: Model
    lengths: Ids
    requests: int
    seconds: float


def cut_step(jobs: Iterable[Job], step_tokens: int) -> list[Part]:
    """Cut a step of `step_tokens` tokens, of the model that the oldest of the `jobs` needs; `jobs` are in their order.

    The oldest gets half of it. What is left goes to the jobs with the fewest tokens left, among the LOOKED_AT oldest.
    At least one pair is taken, however long it is.

        >>> [len(part.rows) for part in cut_step([long, short], 512)]
        [5, 1]
    """
    looked_at = list(islice((job for job in jobs if job.pairs_left), LOOKED_AT))
    oldest = looked_at[0]
    rows = oldest.take(max(step_tokens // 2, int(oldest.encoded.lengths[oldest.order[oldest.taken]])))
    parts = {id(oldest): Part(oldest, rows)}
    left = step_tokens - int(oldest.encoded.lengths[rows].sum())
    for job in sorted((job for job in looked_at if job.model == oldest.model), key=lambda job: job.tokens_left):
        rows = job.take(left) if left > 0 and job.pairs_left else oldest.order[:0]
        if len(rows):
            left -= int(job.encoded.lengths[rows].sum())
            before = parts.get(id(job))
            parts[id(job)] = Part(job, rows if before is None else np.concatenate([before.rows, rows]))
    return list(parts.values())
