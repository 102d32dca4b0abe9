"""The queue: bounded, fair, in order, and nothing that nobody waits for reaches the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import ScoringError
from cappy_engine.serving.jobs import Job, Model, cut_step
from cappy_engine.serving.queue import (
    DeadlinePassed,
    ModelBroken,
    QueueClosed,
    QueueFull,
    QueueLimits,
    ScoringQueue,
    Step,
)

LIMITS = QueueLimits(max_pairs=100, max_tokens=1000, step_tokens=100)
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
        self.is_broken = False
        self.error: Exception | None = None
        self._let = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def __call__(self, model: Model, encoded: EncodedPairs) -> Scores:
        self.steps.append(encoded.lengths.tolist())
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


@pytest.fixture
def model() -> Iterator[Gated]:
    gated = Gated()
    yield gated
    gated.let()


@pytest.fixture
def start(model: Gated) -> Iterator[Callable[..., ScoringQueue]]:
    queues: list[ScoringQueue] = []

    def make(limits: QueueLimits = LIMITS, **hooks: Callable[..., None]) -> ScoringQueue:
        queues.append(ScoringQueue(model, limits, **hooks))
        return queues[-1]

    yield make
    model.let()
    for queue in queues:
        queue.close(wait_seconds=SECONDS)


def submit(queue: ScoringQueue, encoded: EncodedPairs, **more: float) -> Job:
    with queue.reserve(len(encoded)) as place:
        return place.submit(encoded, **more)


def scores(job: Job) -> list[float]:
    return [round(float(score), 3) for score in job.future.result(timeout=SECONDS)]


def test_scores_come_back_in_the_order_of_each_request(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    model.let()
    jobs = [submit(queue, pairs_of(3, 9, 5, first_id=place)) for place in range(8)]
    assert [scores(job) for job in jobs] == [[place + 0.003, place + 0.009, place + 0.005] for place in range(8)]


def test_a_request_to_an_idle_model_runs_at_once_and_alone(start: Callable[..., ScoringQueue], model: Gated) -> None:
    submit(start(), pairs_of(10))
    model.wait()
    assert model.steps == [[10]]


def test_what_comes_while_the_model_is_busy_shares_the_next_step(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start()
    first = submit(queue, pairs_of(10))
    model.wait()
    others = [submit(queue, pairs_of(20)) for _ in range(4)]
    model.let()
    for job in (first, *others):
        job.future.result(timeout=SECONDS)
    assert model.steps == [[10], [20, 20, 20, 20]]


def test_a_step_holds_no_more_tokens_than_it_may(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    model.let()
    jobs = [submit(queue, pairs_of(*[30] * 9)), submit(queue, pairs_of(250, 30))]
    for job in jobs:
        job.future.result(timeout=SECONDS)
    assert all(sum(step) <= 100 or step == [250] for step in model.steps)
    assert sorted(length for step in model.steps for length in step) == [30] * 10 + [250]


def test_a_short_request_does_not_wait_for_a_long_one(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start(QueueLimits(100, 10_000, 100))
    long = submit(queue, pairs_of(*[50] * 40))
    model.wait()
    short = submit(queue, pairs_of(20))
    model.let(2)
    scores(short)
    assert not long.future.done()


def test_a_long_request_ends_however_many_short_ones_come(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start(QueueLimits(1000, 100_000, 100))
    long = submit(queue, pairs_of(*[50] * 20))
    for _ in range(20):  # a step for each pair of the long one, and always more short ones than fit
        for _ in range(10):
            submit(queue, pairs_of(10))
        model.wait()
        model.let(1)
    long.future.result(timeout=SECONDS)


def test_a_queue_takes_no_more_pairs_or_tokens_than_it_may(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start(QueueLimits(max_pairs=3, max_tokens=100, step_tokens=100))
    submit(queue, pairs_of(10))
    model.wait()  # it runs, and does not wait any more
    submit(queue, pairs_of(10, 10))
    with pytest.raises(QueueFull, match="2 pairs wait, with 20 tokens; 2 more do not fit") as full:
        queue.reserve(2)
    assert full.value.retry_seconds >= 1
    with queue.reserve(1) as place, pytest.raises(QueueFull):
        place.submit(pairs_of(81))
    submit(queue, pairs_of(80))
    assert queue.waiting() == (3, 100)


def test_what_is_being_tokenised_takes_room_too(start: Callable[..., ScoringQueue]) -> None:
    queue = start(QueueLimits(max_pairs=3, max_tokens=100, step_tokens=100))
    with queue.reserve(2):
        with pytest.raises(QueueFull):
            queue.reserve(2)
        with queue.reserve(1):
            pass
    with queue.reserve(3):
        pass


def test_a_request_larger_than_the_queue_is_taken_where_nothing_waits(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start(QueueLimits(max_pairs=3, max_tokens=100, step_tokens=50))
    model.let()
    assert len(scores(submit(queue, pairs_of(*[40] * 5)))) == 5


def test_what_is_given_up_never_reaches_the_model(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    submit(queue, pairs_of(10))
    model.wait()
    gone, late = submit(queue, pairs_of(11)), submit(queue, pairs_of(12), deadline=0.0)
    kept = submit(queue, pairs_of(13))
    assert gone.future.cancel()
    model.let()
    kept.future.result(timeout=SECONDS)
    assert model.steps == [[10], [13]]
    with pytest.raises(DeadlinePassed):
        late.future.result(timeout=SECONDS)
    with pytest.raises(CancelledError):
        gone.future.result(timeout=SECONDS)


def test_the_rest_of_a_request_that_is_given_up_does_not_run(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    job = submit(queue, pairs_of(*[50] * 10))
    model.wait()
    job.future.cancel()
    model.let()
    scores(submit(queue, pairs_of(7)))
    assert model.steps == [[50, 50], [7]]


def test_only_the_request_with_a_pair_that_fails_does(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    submit(queue, pairs_of(10))
    model.wait()
    good = [submit(queue, pairs_of(5, 6, first_id=place)) for place in range(3)]
    bad = submit(queue, EncodedPairs.joined([pairs_of(4), pairs_of(4, first_id=POISON)]))
    model.let()
    assert [scores(job) for job in good] == [[place + 0.005, place + 0.006] for place in range(3)]
    with pytest.raises(ScoringError, match="this pair fails") as failed:
        bad.future.result(timeout=SECONDS)
    assert failed.value.index == 1


def test_a_failure_that_no_pair_explains_is_one_request_s_where_the_model_still_works(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    checks: list[int] = []
    queue = start(check=lambda: checks.append(1))
    model.let()
    model.error = ScoringError("no memory")
    with pytest.raises(ScoringError, match="no memory"):
        submit(queue, pairs_of(9)).future.result(timeout=SECONDS)
    assert scores(submit(queue, pairs_of(9))) == [1.009]
    assert checks == [1]


def test_a_mistake_of_ours_does_not_end_the_thread(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    model.let()
    model.error = KeyError("mistake")
    with pytest.raises(ScoringError, match="KeyError: 'mistake'"):
        submit(queue, pairs_of(9)).future.result(timeout=SECONDS)
    assert scores(submit(queue, pairs_of(9))) == [1.009]


def test_a_broken_model_answers_nobody_and_says_so(start: Callable[..., ScoringQueue], model: Gated) -> None:
    told: list[ModelBroken] = []

    def check() -> None:
        raise ModelBroken("wrong scores")

    queue = start(check=check, on_broken=told.append)
    jobs = [submit(queue, pairs_of(60)) for _ in range(4)]
    model.is_broken = True
    model.let()
    for job in jobs:
        with pytest.raises((ModelBroken, ScoringError)):
            job.future.result(timeout=SECONDS)
    with pytest.raises(QueueClosed):
        queue.reserve(1)
    queue.close(wait_seconds=SECONDS)
    assert [str(error) for error in told] == ["wrong scores"]


def test_a_closing_queue_answers_what_it_took_and_takes_no_more(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start()
    jobs = [submit(queue, pairs_of(60)) for _ in range(3)]
    model.let()
    assert queue.close(wait_seconds=SECONDS)
    assert [scores(job) for job in jobs] == [[1.06]] * 3
    with pytest.raises(QueueClosed):
        queue.reserve(1)


def test_a_closing_queue_waits_for_who_has_a_place(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    model.let()
    closed = threading.Thread(target=queue.close)
    with queue.reserve(1) as place:
        closed.start()
        assert scores(place.submit(pairs_of(5))) == [1.005]
        assert scores(place.submit(pairs_of(6), model="exact")) == [1.006]
    closed.join(SECONDS)
    assert not closed.is_alive()


def test_what_is_left_when_the_time_to_close_is_over_fails(start: Callable[..., ScoringQueue], model: Gated) -> None:
    queue = start()
    submit(queue, pairs_of(60))
    model.wait()
    left = submit(queue, pairs_of(60))
    assert not queue.close(wait_seconds=0.01)
    with pytest.raises(QueueClosed):
        left.future.result(timeout=SECONDS)


def test_every_step_is_told(start: Callable[..., ScoringQueue], model: Gated) -> None:
    told: list[Step] = []
    queue = start(on_step=told.append)
    model.let()
    scores(submit(queue, pairs_of(8, 9)))
    queue.close(wait_seconds=SECONDS)
    assert [(step.lengths.tolist(), step.requests) for step in told] == [([9, 8], 1)]


def test_a_request_without_pairs_is_answered_at_once(start: Callable[..., ScoringQueue]) -> None:
    assert scores(submit(start(), pairs_of())) == []


@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(1, 120))
def test_steps_take_every_pair_once_and_keep_their_budget(requests: list[list[int]], step_tokens: int) -> None:
    jobs = [Job(pairs_of(*lengths), "chosen", 0.0) for lengths in requests]
    taken: list[list[int]] = [[] for _ in jobs]
    while waiting := [job for job in jobs if job.pairs_left]:
        oldest, parts = waiting[0], cut_step(waiting, step_tokens)
        lengths = [int(part.job.encoded.lengths[row]) for part in parts for row in part.rows]
        assert sum(lengths) <= step_tokens or len(lengths) == 1
        assert any(part.job is oldest for part in parts)
        for part in parts:
            taken[jobs.index(part.job)].extend(part.rows.tolist())
    assert [sorted(rows) for rows in taken] == [list(range(len(lengths))) for lengths in requests]
