"""Run requests beside each other, and leave at the first that fails. Knows nothing of what they ask."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TypeVar

Result = TypeVar("Result")


def run_all(jobs: Sequence[Callable[[], Result]], concurrent: int) -> list[Result]:
    """Give the results of `jobs`, in order; at most `concurrent` run at once.

    At the first error, or an interrupt, jobs that have not begun are dropped and running ones are left behind: their
    threads are daemons. A process would wait at its end for the threads of a ThreadPoolExecutor.

        >>> run_all([lambda: 1, lambda: 2], concurrent=2)
        [1, 2]
    """
    results: list[Future[Result]] = [Future() for _ in jobs]
    waiting = collections.deque(zip(jobs, results, strict=True))

    def work() -> None:
        while True:
            try:
                job, result = waiting.popleft()
            except IndexError:
                return
            try:
                result.set_result(job())
            except BaseException as error:  # of any kind: it belongs to the caller, who waits for the result
                waiting.clear()
                result.set_exception(error)

    for _ in range(min(concurrent, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    try:
        done, _ = wait(results, return_when=FIRST_EXCEPTION)
        for result in results:
            if result in done:
                result.result()  # raises
        return [result.result() for result in results]
    finally:
        waiting.clear()
