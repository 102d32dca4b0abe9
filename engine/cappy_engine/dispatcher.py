"""Run a list of batches on what there is: one session, one for each of several threads, or several GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from cappy_engine.batching import Batch, EncodedPairs, Grouping, Ids, Plan, Scores, keeps_busy, plan_batches
from cappy_engine.buckets import bucket_lengths
from cappy_engine.errors import ScoringError
from cappy_engine.forking import tell_after_fork
from cappy_engine.inputs import full_batch, model_inputs
from cappy_engine.overlap import PythonEnding, starting
from cappy_engine.session import Inputs, Session

CLOSED = "this scorer was closed; open another one with Scorer.open"
PROBE_TOKENS = 8
"""The tokens of the made-up pair that tells a broken model from a pair at fault."""


class LazySession:
    """A session that `open_now` opens at its first run, and again in a forked child.

    Any thread may call it. `session` is one that is open already.
    """

    device = "cpu"

    def __init__(self, open_now: Callable[[], Session], *, session: Session | None = None) -> None:
        self._open_now = open_now
        self._session = session
        self._lock = threading.Lock()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Forget the parent's session, and its lock, which another thread of the parent may hold."""
        self._session = None
        self._lock = threading.Lock()

    def run(self, inputs: Inputs) -> Scores:
        """Score one batch, as the session does. Raises what opening it raises, too."""
        with self._lock:
            if self._session is None:
                self._session = self._open_now()
            session = self._session
        return session.run(inputs)


class Dispatcher:
    """Scores encoded pairs, in batches. Any number of threads may call it.

    `session` runs one batch on all threads. `narrow_session`, if any, runs `callers` batches at once, one thread each;
    where it is the same object, batches always run beside each other. `workers` says how many run at once, `is_apart`
    whether the CPU is free meanwhile.
    """

    def __init__(
        self,
        session: Session,
        grouping: Grouping,
        *,
        pad_token_id: int,
        narrow_session: Session | None = None,
        callers: int = 1,
    ) -> None:
        if callers < 1:
            raise ValueError(f"callers must be at least 1, got {callers}")
        self.grouping = grouping
        self._pad_token_id = pad_token_id
        self._session: Session | None = session
        self._narrow = narrow_session if callers > 1 else None
        self.workers = callers if self._narrow is not None else 1
        self.is_apart = session.device != "cpu"
        self._has_wide = session is not narrow_session
        self._callers = self._start_callers()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Start threads of the child's own; sessions open again by themselves, or say that they cannot."""
        self._callers = self._start_callers()

    def _start_callers(self) -> ThreadPoolExecutor | None:
        return ThreadPoolExecutor(self.workers, "cappy") if self._narrow is not None else None

    def plan(self, lengths: Ids, grouping: Grouping | None = None) -> Plan:
        """Plan batches for pairs of these `lengths`, (n,) int64 in tokens, and how they run.

        `grouping` replaces the dispatcher's own.
        """
        grouping = grouping or self.grouping
        if self.workers > 1:
            batches = self._cut(lengths, grouping, workers=self.workers)
            if len(batches) > 1 and (not self._has_wide or keeps_busy(batches, lengths, self.workers)):
                return Plan(batches, is_shared=True)
        return Plan(self._cut(lengths, grouping))

    def _cut(self, lengths: Ids, grouping: Grouping, workers: int = 1) -> list[Batch]:
        if grouping.buckets:
            lengths = bucket_lengths(lengths, grouping.buckets)
        return plan_batches(
            lengths, max_batch_tokens=grouping.max_batch_tokens, padding=grouping.padding, workers=workers
        )

    def run(
        self,
        encoded: EncodedPairs,
        *,
        grouping: Grouping | None = None,
        progress: Callable[[Batch], object] = lambda batch: None,
    ) -> Scores:
        """Score n pairs: (n,) float32, in their order.

        `grouping` replaces the dispatcher's own. `progress` is called after every batch. Raises ScoringError, with the
        index of a pair that fails in the model; the index is None where no single pair is at fault.
        """
        plan = self.plan(encoded.lengths, grouping)
        scores = np.empty(len(encoded), dtype=np.float32)
        for batch, found in self._each(plan, encoded):
            scores[batch.rows] = found
            progress(batch)
        return scores

    def run_beside(self, encoded: EncodedPairs) -> Scores:
        """Score n pairs like `run`, on one of the `workers`: so many threads may do that at once without a wait.

        `run` shares its batches out and waits for the last one. Where pairs keep coming, as in a server, threads call
        this instead.
        """
        return self._run_on(_opened(self._narrow or self._session), encoded)

    def ways(self) -> list[Callable[[EncodedPairs], Scores]]:
        """List all ways in which pairs are run: `run`, and `run_beside` on each of the sessions that are shared out.

        >>> [run(encoded) for run in dispatcher.ways()]
        """
        session = _opened(self._narrow or self._session)
        each: Callable[[], list[Session]] = getattr(session, "each", lambda: [session])
        return [self.run, *(partial(self._run_on, one) for one in each())]

    def _run_on(self, session: Session, encoded: EncodedPairs) -> Scores:
        scores = np.empty(len(encoded), dtype=np.float32)
        for batch in self._cut(encoded.lengths, self.grouping):
            scores[batch.rows] = self._score(session, encoded, batch)
        return scores

    def close(self) -> None:
        """Free the model, once no call uses it any more; running afterwards raises ScoringError.

        This waits for nothing: a signal handler may call it in the midst of a run, whose locks its thread then holds.
        """
        self._session = self._narrow = None
        self._callers = None  # a pool to which nothing refers ends its threads

    def _each(self, plan: Plan, encoded: EncodedPairs) -> Iterator[tuple[Batch, Scores]]:
        """Yield each batch with its scores, in the plan's order."""
        callers = self._callers
        if plan.is_shared and callers is not None:
            try:
                with starting():
                    shared = callers.map(partial(self._score_narrow, encoded), plan.batches)
                return zip(plan.batches, shared, strict=True)
            except PythonEnding:
                pass  # without the pool
        score = partial(self._score, _opened(self._session), encoded)
        return zip(plan.batches, map(score, plan.batches), strict=True)

    def _score_narrow(self, encoded: EncodedPairs, batch: Batch) -> Scores:
        # The pool does not hold the session: it is freed at once when this is closed.
        return self._score(_opened(self._narrow), encoded, batch)

    def _score(self, session: Session, encoded: EncodedPairs, batch: Batch) -> Scores:
        """Score a batch; where it fails, find the pair that is at fault, on the same session."""
        inputs = model_inputs(encoded, batch, pad_token_id=self._pad_token_id)
        with _held(session) as own:
            try:
                return finite(own.run(inputs))
            except ScoringError as error:
                place, problem = self._find_guilty(own, encoded, batch)
                if place is None:
                    raise
                raise ScoringError(problem, place) from error

    def _find_guilty(self, session: Session, encoded: EncodedPairs, failed: Batch) -> tuple[int | None, str]:
        """Find the first row of a batch that fails alone, twice, and its error; None if no single pair is at fault.

        No pair is at fault in three cases. A made-up pair, padded to the same length, fails too, before or after the
        search: the model or the device is broken. The rows fail only together: a large batch has no memory. Or nothing
        fails the second time.
        """
        harmless = full_batch(1, failed.length, pad_token_id=self._pad_token_id)
        harmless["attention_mask"][:, PROBE_TOKENS:] = 0

        def problem_with(rows: Ids) -> str:
            batch = Batch(rows, failed.length)
            return _problem_of(session, model_inputs(encoded, batch, pad_token_id=self._pad_token_id))

        if _problem_of(session, harmless):
            return None, ""
        rows = np.sort(failed.rows)
        while len(rows) > 1:
            half, rest = np.split(rows, [len(rows) // 2])
            rows = half if problem_with(half) else rest
        problem = problem_with(rows)
        return (int(rows[0]), problem) if problem and not _problem_of(session, harmless) else (None, "")


def _opened(session: Session | None) -> Session:
    if session is None:
        raise ScoringError(CLOSED)
    return session


def _held(session: Session) -> AbstractContextManager[Session]:
    """Keep one of the sessions that `session` shares out (`gpu.sessions.SharedSession`), or `session` itself."""
    hold: Callable[[], AbstractContextManager[Session]] = getattr(session, "hold", lambda: nullcontext(session))
    return hold()


def finite(scores: Scores) -> Scores:
    """Return the scores. Raises ScoringError if one is NaN or infinite.

    >>> finite(np.array([0.5], dtype=np.float32))
    array([0.5], dtype=float32)
    """
    is_score = np.isfinite(scores)
    if not is_score.all():
        raise ScoringError(f"the model gave {scores[~is_score][0]}, which is not a score")
    return scores


def _problem_of(session: Session, inputs: Inputs) -> str:
    """Return the message of a run's ScoringError, or nothing if the run gives scores."""
    try:
        finite(session.run(inputs))
    except ScoringError as error:
        return error.problem
    return ""
