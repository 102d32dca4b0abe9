"""The queue: bounded, fair, in order, and nothing that nobody waits for reaches the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_engine.errors import DeadlinePassed, QueueFull
from cappy_engine.serving.jobs import Held, Job, Model, QueueLimits, Step, cut_step
from cappy_engine.serving.queue import ScoringQueue
from tests.support.gated import SECONDS, Gated, pairs_of, scores, submit


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


def test_a_request_that_a_step_takes_in_two_turns_keeps_its_order(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start()
    submit(queue, pairs_of(10))
    model.wait()
    oldest, other = submit(queue, pairs_of(10, 20, 30, first_id=5)), submit(queue, pairs_of(10))
    model.let()
    assert scores(oldest) == [5.01, 5.02, 5.03]
    assert scores(other) == [1.01]
    assert len(model.steps) == 2


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
    problem = "2 pairs wait or become tokens, with about 20 tokens; 2 more do not fit into max_queue_pairs, 3"
    with pytest.raises(QueueFull, match=problem) as full:
        queue.reserve(2)
    assert full.value.retry_seconds >= 1
    problem = "with about 20 tokens; 1 more, with about 81 tokens, do not fit into max_queue_tokens, 100"
    with queue.reserve(1) as place, pytest.raises(QueueFull, match=problem):
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


def test_what_will_not_fit_by_its_expected_tokens_is_refused_before_they_are_made(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start(QueueLimits(max_pairs=100, max_tokens=100, step_tokens=50))
    with queue.reserve(1, expected_tokens=101):  # nothing else waits
        pass
    submit(queue, pairs_of(10))
    model.wait()
    submit(queue, pairs_of(60))
    with queue.reserve(1, expected_tokens=40):
        pass
    with pytest.raises(QueueFull):
        queue.reserve(1, expected_tokens=41)


def test_who_is_refused_hears_of_the_tokens_that_are_being_made(start: Callable[..., ScoringQueue]) -> None:
    queue = start(QueueLimits(max_pairs=100, max_tokens=100, step_tokens=50))
    problem = "3 pairs wait or become tokens, with about 120 tokens; 2 more, with about 101 tokens, do not fit"
    with queue.reserve(3, expected_tokens=120):
        with pytest.raises(QueueFull, match=f"{problem} into max_queue_tokens, 100"):
            queue.reserve(2, expected_tokens=101)
        with queue.reserve(1, expected_tokens=50), pytest.raises(QueueFull, match=r"4 pairs .* about 170 tokens"):
            queue.reserve(2, expected_tokens=101)
    with queue.reserve(1), pytest.raises(QueueFull, match="1 pairs wait or become tokens, with about 0 tokens"):
        queue.reserve(2, expected_tokens=101)


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


def test_every_step_is_told(start: Callable[..., ScoringQueue], model: Gated) -> None:
    told: list[Step] = []
    queue = start(on_step=told.append)
    model.let()
    scores(submit(queue, pairs_of(8, 9)))
    queue.close(wait_seconds=SECONDS)
    assert [(step.lengths.tolist(), step.requests, step.workers) for step in told] == [([8, 9], 1, 1.0)]


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


def test_workers_take_their_next_steps_without_waiting_for_each_other(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start(QueueLimits(100, 10_000, step_tokens=100, workers=2))
    submit(queue, pairs_of(31))
    model.wait()  # it runs alone: nothing else is there
    for length in (41, 42, 43, 44):
        submit(queue, pairs_of(length))
    assert model.steps == [[31]]
    model.let(1)
    model.wait()
    model.wait()  # more waits than fits into a step, so both workers have one
    assert model.steps[1:] == [[41], [42]]
    model.let(1)
    model.wait()
    assert model.steps[3:] == [[43]]


def test_workers_share_what_is_left_and_take_whole_batches(start: Callable[..., ScoringQueue], model: Gated) -> None:
    told: list[Step] = []
    queue = start(QueueLimits(1000, 10_000, step_tokens=400, batch_tokens=50, workers=2), on_step=told.append)
    job = submit(queue, pairs_of(*[10] * 80))
    model.wait()
    for _ in range(5):  # the others begin one by one, beside one that runs
        model.wait()
        model.let(1)
    model.let()
    assert len(scores(job)) == 80
    assert [sum(step) for step in model.steps] == [200, 200, 200, 100, 50, 50]
    ends = time.monotonic() + SECONDS
    while len(told) < 6 and time.monotonic() < ends:  # a step is told when it is over
        time.sleep(0.001)
    assert [step.workers for step in told] == [0.5] * 6


def test_the_oldest_step_tells_for_how_long_the_model_has_been_running(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start(QueueLimits(100, 10_000, step_tokens=100, workers=2))
    assert queue.running_seconds() == 0
    submit(queue, pairs_of(31))
    model.wait()
    for length in (41, 42, 43):
        submit(queue, pairs_of(length))
    for _ in range(2):  # the first ends, and two run beside each other; one of these ends, and the third one begins
        model.let(1)
        model.wait()
        time.sleep(0.2)
    model.wait()
    assert len(model.steps) == 4
    assert queue.running_seconds() > 0.3  # the newest has been running for 0.2, and the other since both began


@pytest.mark.parametrize(("tokens_per_second", "seconds"), [(0.0, 1), (100.0, 6), (99.0, 7), (1e9, 1)])
def test_who_is_refused_hears_when_what_waits_will_be_done(tokens_per_second: float, seconds: int) -> None:
    held = Held(waiting_pairs=3, waiting_tokens=600)
    with pytest.raises(QueueFull) as full:
        held.check(QueueLimits(100, 600, 100), 1, 1, 0, tokens_per_second)
    assert full.value.retry_seconds == seconds


def test_a_step_is_of_one_model(start: Callable[..., ScoringQueue], model: Gated) -> None:
    """Else an exact winner would be told by int8."""
    queue = start()
    submit(queue, pairs_of(10))
    model.wait()
    kinds: list[Model] = ["chosen", "exact", "chosen", "exact"]
    jobs = [submit(queue, pairs_of(20 + place), model=kind) for place, kind in enumerate(kinds)]
    model.let()
    assert [scores(job) for job in jobs] == [[1.02], [1.021], [1.022], [1.023]]
    assert (model.models, model.steps) == (["chosen", "chosen", "exact"], [[10], [20, 22], [21, 23]])


def test_what_fits_into_a_step_runs_alone(start: Callable[..., ScoringQueue], model: Gated) -> None:
    told: list[Step] = []
    queue = start(QueueLimits(100, 10_000, step_tokens=100, workers=2), on_step=told.append)
    submit(queue, pairs_of(60))
    model.wait()
    jobs = [submit(queue, pairs_of(30)) for _ in range(3)]
    model.let()
    for job in jobs:
        job.future.result(timeout=SECONDS)
    queue.close(wait_seconds=SECONDS)
    assert (model.steps, [step.workers for step in told]) == ([[60], [30, 30, 30]], [1.0, 1.0])
