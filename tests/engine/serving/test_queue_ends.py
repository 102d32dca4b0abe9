"""How a queue deals with what fails, and how it ends: only the guilty fail, and who was let in is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import ModelBroken, QueueClosed, QueueFull, ScoringError
from cappy_engine.serving.jobs import QueueLimits
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


def test_a_pair_that_fails_in_a_later_step_is_named_by_its_place_in_the_request(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start()
    model.let()
    job = submit(queue, EncodedPairs.joined([pairs_of(5), pairs_of(60, 70), pairs_of(50, first_id=POISON)]))
    with pytest.raises(ScoringError, match="this pair fails") as failed:
        job.future.result(timeout=SECONDS)
    assert failed.value.index == 3
    assert model.steps[0] == [70]


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
    heard: list[list[bool]] = []

    def check() -> None:
        raise ModelBroken("wrong scores")

    def on_broken(error: ModelBroken) -> None:
        told.append(error)
        heard.append([job.future.done() for job in jobs])

    queue = start(check=check, on_broken=on_broken)
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
    assert heard == [[False] * 4]  # the server says first that it is not ready, and then its clients hear of it


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


def test_a_check_that_fails_itself_breaks_the_model_and_answers_nobody(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    told: list[ModelBroken] = []

    def check() -> None:
        raise RuntimeError("mistake")

    queue = start(check=check, on_broken=told.append)
    model.let()
    model.error = MemoryError()
    with pytest.raises((ScoringError, ModelBroken)):
        submit(queue, pairs_of(9)).future.result(timeout=SECONDS)
    queue.close(wait_seconds=SECONDS)
    assert ["mistake" in str(error) for error in told] == [True]


def test_hundreds_of_pairs_that_fail_do_not_keep_the_good_ones_from_their_scores(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start(QueueLimits(1000, 100_000, 5000))
    submit(queue, pairs_of(10))
    model.wait()
    bad = [submit(queue, pairs_of(4, first_id=POISON)) for _ in range(250)]
    good = [submit(queue, pairs_of(5, first_id=place)) for place in range(3)]
    model.let()
    assert [scores(job) for job in good] == [[place + 0.005] for place in range(3)]
    for job in bad:
        with pytest.raises(ScoringError, match="this pair fails"):
            job.future.result(timeout=SECONDS)


def test_a_place_that_is_left_by_an_exception_gives_up_what_it_submitted(
    start: Callable[..., ScoringQueue], model: Gated
) -> None:
    queue = start()
    submit(queue, pairs_of(10))
    model.wait()
    place = queue.reserve(1)
    job = place.submit(pairs_of(11))
    place.__exit__(KeyboardInterrupt)
    assert job.future.cancelled()
    assert queue.waiting() == (0, 0)
    with pytest.raises(QueueClosed):
        place.submit(pairs_of(12))
    model.let()
    scores(submit(queue, pairs_of(13)))
    assert model.steps == [[10], [13]]


def test_texts_that_become_tokens_are_bounded_too(start: Callable[..., ScoringQueue]) -> None:
    queue = start(QueueLimits(100, 1000, 100, max_chars=50))
    problem = "1000 characters become tokens; 10 more do not fit, of at most 50"
    with queue.reserve(1, 1000), pytest.raises(QueueFull, match=problem):  # the first may: nothing else is there
        queue.reserve(1, 10)
    with queue.reserve(1, 30), queue.reserve(1, 20), pytest.raises(QueueFull):
        queue.reserve(1, 1)
