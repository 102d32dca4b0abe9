"""Cut the next step for the model from the requests that wait. Pure, but for the future that each of them holds.

Half of a step belongs to the oldest request, and the rest to the requests with the fewest tokens left. So a short
request does not wait for a long one to end, and a long one goes on however many short ones come.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np

from cappy_engine.batching import EncodedPairs, Ids, Scores
from cappy_engine.errors import CappyError, QueueFull

Model = Literal["chosen", "exact"]
"""The model that the scorer was opened with, or fp32 beside it."""
LOOKED_AT = 256
"""Requests of which a step is cut: the model must not wait while thousands are sorted."""


@dataclass(frozen=True)
class QueueLimits:
    """At most `max_pairs` and `max_tokens` wait, and `max_chars` characters become tokens.

    A larger request is taken where nothing else waits. A step takes `step_tokens` if it runs alone. Beside others, it
    takes one worker's share of them. If little waits it takes less, but at least `batch_tokens`.
    """

    max_pairs: int
    max_tokens: int
    step_tokens: int
    workers: int = 1
    max_chars: int = 2**62
    batch_tokens: int = 1

    def share(self, waiting_tokens: int) -> int:
        """Tell how many tokens a step takes that runs beside others.

        >>> QueueLimits(100, 10_000, step_tokens=400, batch_tokens=50, workers=2).share(300)
        150
        """
        fair = max(self.batch_tokens, -(-waiting_tokens // self.workers))
        return max(1, min(self.step_tokens // self.workers, fair))


@dataclass
class Held:
    """What a queue holds: pairs and tokens that wait, and pairs, tokens and characters for which there is room."""

    waiting_pairs: int = 0
    waiting_tokens: int = 0
    reserved_pairs: int = 0
    reserved_tokens: int = 0
    reserved_chars: int = 0

    def check(self, limits: QueueLimits, pairs: int, tokens: int, chars: int, tokens_per_second: float) -> None:
        """Raise QueueFull if more do not fit; it says when to come again, if `tokens_per_second` is not 0.

        `tokens` may be a guess. Those of reserved pairs are one: the error tells them, but they keep nobody out.

        >>> Held(waiting_pairs=8).check(QueueLimits(16, 4096, 512), 8, 0, 0, 0.0)
        """
        taken = self.waiting_pairs + self.reserved_pairs
        if not taken:
            return
        if taken + pairs > limits.max_pairs:
            problem = f"{self._told(taken)}; {pairs} more do not fit into max_queue_pairs, {limits.max_pairs}"
        elif self.waiting_tokens + tokens > limits.max_tokens:
            more = f"{pairs} more, with about {tokens} tokens,"
            problem = f"{self._told(taken)}; {more} do not fit into max_queue_tokens, {limits.max_tokens}"
        elif self.reserved_chars and self.reserved_chars + chars > limits.max_chars:
            most = limits.max_chars
            problem = f"{self.reserved_chars} characters become tokens; {chars} more do not fit, of at most {most}"
        else:
            return
        seconds = self.waiting_tokens / tokens_per_second if tokens_per_second else 1
        raise QueueFull(f"the server is busy: {problem}. Send the request again later", max(1, math.ceil(seconds)))

    def _told(self, taken: int) -> str:
        tokens = self.waiting_tokens + self.reserved_tokens
        return f"{taken} pairs wait or become tokens, with about {tokens} tokens"


@dataclass(eq=False)
class Job:
    """The pairs of one request that wait or run, the longest first; `future` gets their scores, (n,) float32."""

    encoded: EncodedPairs
    model: Model
    deadline: float
    future: Future[Scores] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    taken: int = 0

    def __post_init__(self) -> None:
        self.scores = np.full(len(self.encoded), np.nan, dtype=np.float32)
        self.tokens_left = int(self.encoded.lengths.sum())
        """The tokens of the pairs that no step has taken."""

    @property
    def pairs_left(self) -> int:
        """Count the pairs that no step has taken."""
        return len(self.encoded) - self.taken

    def take(self, tokens: int, *, at_least_one: bool = False) -> Ids:
        """Take the next pairs, of at most `tokens` tokens: their places. Whoever takes all of them gets them in order.

        With `at_least_one` the first is taken however long it is.
        """
        if not self.taken and self.tokens_left <= tokens:
            rows = np.arange(len(self.encoded))
        else:
            ends = np.cumsum(self.encoded.lengths[self._longest_first[self.taken :]])
            count = int(np.searchsorted(ends, tokens, side="right"))
            rows = self._longest_first[self.taken : self.taken + max(count, int(at_least_one))]
        self.taken += len(rows)
        self.tokens_left -= int(self.encoded.lengths[rows].sum())
        return rows

    def put(self, rows: Ids, scores: Scores) -> None:
        """Take the scores of some pairs, none of them NaN. Workers may do that at once: nothing is counted."""
        self.scores[rows] = scores

    @property
    def is_scored(self) -> bool:
        """Tell whether all pairs have their scores."""
        return not bool(np.isnan(self.scores).any())

    def succeed(self) -> None:
        """Answer with the scores, unless the client gave the request up meanwhile."""
        self.ended = time.monotonic()
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(self.scores)

    def fail(self, error: CappyError) -> None:
        """Answer with an error, unless the request was answered or given up."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    @cached_property
    def _longest_first(self) -> Ids:
        return np.argsort(-self.encoded.lengths, kind="stable")


@dataclass(frozen=True)
class Part:
    """The pairs of a job that a step takes: `rows` are their places, in order if they are all."""

    job: Job
    rows: Ids

    @property
    def encoded(self) -> EncodedPairs:
        """Give these pairs."""
        return self.job.encoded if len(self.rows) == len(self.job.encoded) else self.job.encoded.chosen(self.rows)


@dataclass(frozen=True, eq=False)
class NextStep:
    """Describes the next step: its parts, the lengths of their pairs, and whether it runs alone."""

    parts: list[Part]
    lengths: Ids
    is_alone: bool


@dataclass(frozen=True)
class Step:
    """What one run held: the `lengths` of its pairs (n,) int64, the requests they came from, and how long it took.

    `workers` is the share of the model's workers that it had: 1.0 is all of them.
    """

    model: Model
    lengths: Ids
    requests: int
    seconds: float
    workers: float


def cut_step(jobs: Iterable[Job], step_tokens: int) -> list[Part]:
    """Cut a step of `step_tokens` tokens for the model of the oldest job.

    The `jobs` are in the order in which they came. The oldest gets half of the step. The rest of the step goes to the
    jobs with the fewest tokens left, among the LOOKED_AT oldest. At least one pair is taken, however long it is.

        >>> [len(part.rows) for part in cut_step([long, short], 512)]
        [5, 1]
    """
    looked_at = list(islice((job for job in jobs if job.pairs_left), LOOKED_AT))
    oldest = looked_at[0]
    rows = oldest.take(step_tokens // (2 if len(looked_at) > 1 else 1), at_least_one=True)
    parts = {id(oldest): Part(oldest, rows)}
    left = step_tokens - int(oldest.encoded.lengths[rows].sum())
    for job in sorted((job for job in looked_at if job.model == oldest.model), key=lambda job: job.tokens_left):
        if left > 0 and job.pairs_left and len(rows := job.take(left)):
            left -= int(job.encoded.lengths[rows].sum())
            before = parts.get(id(job))
            parts[id(job)] = Part(job, rows if before is None else np.sort(np.concatenate([before.rows, rows])))
    return list(parts.values())
