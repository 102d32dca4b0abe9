"""Requests run beside each other, in order and bounded; the first error ends all without waiting for the others."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import pytest

from cappy_bench.candidates.threads import run_all


def test_results_come_in_the_order_of_the_jobs() -> None:
    def job(number: int) -> int:
        time.sleep(0.002 * (9 - number))
        return number

    jobs = [functools.partial(job, number) for number in range(9)]
    assert run_all(jobs, 4) == list(range(9))
    assert run_all(jobs, 100) == list(range(9))
    assert run_all(jobs[:0], 4) == []


def test_as_many_run_at_once_as_asked_for_and_no_more() -> None:
    together, lock, running, most = threading.Barrier(3, timeout=30), threading.Lock(), 0, 0

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait()  # nobody goes on before three have come
        with lock:
            running -= 1

    run_all([job] * 9, 3)
    assert most == 3


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_the_first_error_drops_what_has_not_begun_and_does_not_wait(error: BaseException) -> None:
    begun, over, done = threading.Event(), threading.Event(), list[int]()

    def slow() -> None:
        begun.set()
        over.wait(30)

    def fail() -> None:
        begun.wait(30)
        raise error

    jobs: list[Callable[[], None]] = [slow, fail, *(functools.partial(done.append, number) for number in range(1000))]
    try:
        with pytest.raises(type(error)):
            run_all(jobs, 2)
        assert not over.is_set()
        assert done == []
    finally:
        over.set()
