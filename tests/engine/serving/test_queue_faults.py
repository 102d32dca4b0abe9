"""A queue goes on where a client gives its request up in the midst of a step, and says so where it cannot go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from cappy_engine.batching import EncodedPairs, Scores
from cappy_engine.errors import ModelBroken, QueueClosed, QueueFull, ScoringError
from cappy_engine.serving.jobs import Model, QueueLimits
from cappy_engine.serving.queue import ScoringQueue
from tests.support.gated import POISON, SECONDS, Gated, pairs_of, scores, submit


@pytest.mark.parametrize("first_id", [1, POISON], ids=["and has its scores", "and fails"])
def test_a_request_that_is_given_up_while_it_runs_breaks_nothing(
    start: Callable[..., ScoringQueue], model: Gated, first_id: int
) -> None:
    broken: list[ModelBroken] = []
    queue = start(on_broken=broken.append)
    job = submit(queue, pairs_of(10, first_id=first_id))
    model.wait()
    assert job.future.cancel()
    model.let()
    assert scores(submit(queue, pairs_of(11))) == [1.011]
    assert broken == []


def test_a_request_that_is_given_up_while_it_runs_breaks_nothing_where_no_pair_is_at_fault(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    broken: list[ModelBroken] = []
    queue = start(on_broken=broken.append)
    job = submit(queue, pairs_of(10))
    model.wait()
    model.error = ScoringError("no memory")
    assert job.future.cancel()
    model.let()
    assert scores(submit(queue, pairs_of(11))) == [1.011]
    assert broken == []


def test_a_fault_of_ours_in_the_queue_is_told_and_leaves_nobody_waiting(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    told: list[ModelBroken] = []
    begun: list[object] = []

    def fails(step: object) -> None:
        begun.append(step)
        raise KeyError("mistake")

    queue = start(on_step=fails, on_broken=told.append)
    jobs = [submit(queue, pairs_of(60))]
    model.wait()
    jobs.append(submit(queue, pairs_of(61)))
    model.let()
    assert scores(jobs[0]) == [1.06]
    with pytest.raises(ModelBroken, match="the queue failed: 'mistake'"):
        jobs[1].future.result(timeout=SECONDS)
    with pytest.raises(QueueClosed):
        queue.reserve(1)
    assert (len(begun), len(told)) == (1, 1)


def test_a_model_that_breaks_in_two_workers_at_once_is_told_once() -> None:
    told: list[ModelBroken] = []
    both = threading.Barrier(2)

    def run(model: Model, encoded: EncodedPairs, is_alone: bool) -> Scores:
        if not is_alone:
            both.wait(SECONDS)
            raise ScoringError("the device is gone")
        return np.ones(len(encoded), dtype=np.float32)

    def check() -> None:
        both.wait(SECONDS)
        raise ModelBroken("wrong scores")

    queue = ScoringQueue(run, QueueLimits(100, 1000, 100, workers=2), check=check, on_broken=told.append)
    job = submit(queue, pairs_of(60, 60))
    with pytest.raises((ModelBroken, ScoringError)):
        job.future.result(timeout=SECONDS)
    queue.close(wait_seconds=SECONDS)
    assert len(told) == 1


def test_who_still_makes_tokens_when_the_time_to_close_is_over_comes_too_late(
    start: Callable[..., ScoringQueue],
) -> None:
    queue = start()
    with queue.reserve(1, chars=30) as place:
        assert not queue.close(wait_seconds=0.01)
        assert queue.encoding_chars() == 0
        with pytest.raises(QueueClosed, match="send it again"):
            place.submit(pairs_of(5))


def test_who_is_refused_hears_of_a_time_that_was_learnt_from_earlier_steps(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start(QueueLimits(max_pairs=100, max_tokens=1000, step_tokens=1000))
    first = submit(queue, pairs_of(10))
    model.wait()
    time.sleep(0.1)  # at least: less than 100 tokens a second
    model.let(1)
    scores(first)
    submit(queue, pairs_of(1))
    model.wait()
    submit(queue, pairs_of(1000))
    with pytest.raises(QueueFull) as full:
        queue.reserve(1, expected_tokens=1)
    assert full.value.retry_seconds >= 10


def test_a_request_of_several_steps_has_waited_until_the_first_one(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start()
    job = submit(queue, pairs_of(60, 61))
    model.wait()
    began = job.started
    assert began is not None
    model.let(1)
    model.wait()
    assert len(model.steps) == 2
    assert job.started == began
