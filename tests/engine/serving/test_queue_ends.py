"""How a queue deals with what fails, and how it ends: only the guilty fail, and who was let in is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import ModelBroken, QueueClosed, ScoringError
from cappy_engine.serving.queue import ScoringQueue
from tests.support.gated import POISON, SECONDS, Gated, pairs_of, scores, submit


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
