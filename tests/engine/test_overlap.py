"""Work beside other work ends with its block, whatever comes in between."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import pytest

from cappy_engine import Scorer, overlap
from cappy_engine.errors import ScoringError
from cappy_engine.overlap import Behind, ahead, check_waited_for


def test_all_is_done_in_order_when_the_block_ends() -> None:
    done: list[int] = []
    with Behind(done.append) as later:
        for number in range(20):
            later(number)
    assert done == list(range(20))
    with ahead(iter(range(20))) as ready:
        assert list(ready) == list(range(20))


def test_an_error_comes_behind_what_was_done_before_it_and_nothing_is_done_after_it() -> None:
    done: list[int] = []

    def write(item: int) -> None:
        if item == 3:
            raise OSError("no space left")
        done.append(item)

    def write_all(numbers: range) -> None:
        with Behind(write) as later:
            for number in numbers:
                later(number)

    for count in (4, 5, 20):  # also where no call comes after it, that could raise it
        done.clear()
        with pytest.raises(OSError, match="no space left"):
            write_all(range(count))
        assert done == [0, 1, 2]

    def numbers() -> Iterator[int]:
        yield from range(3)
        raise OSError("cannot be read")

    with ahead(numbers()) as ready:
        assert [next(ready) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="cannot be read"):
            next(ready)


@pytest.mark.parametrize("begin", [lambda: ahead(iter(range(9))), lambda: Behind(print)], ids=["ahead", "Behind"])
def test_a_signal_while_the_thread_starts_ends_it_too(
    monkeypatch: pytest.MonkeyPatch, begin: Callable[[], AbstractContextManager[object]]
) -> None:
    """Python waits for threads at its end: one that nobody ends keeps the process for ever."""
    start, started = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), begin():
        pytest.fail("the block began")
    for thread in started:
        thread.join(20)
    assert [thread.is_alive() for thread in started] == [False]


def test_memory_is_bounded_by_what_waits() -> None:
    may_go, asked, made = threading.Event(), list[int](), list[int]()
    later: Behind[int] = Behind(lambda item: may_go.wait(30))

    def ask() -> None:
        with later:
            for number in range(20):
                asked.append(number)
                later(number)

    def numbers() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with ahead(numbers()) as ready:
            assert next(ready) == 0
            asking.join(0.3)  # time enough for all, if nothing kept them
            assert len(made) <= 3
        assert len(asked) <= 3
    finally:
        may_go.set()
        asking.join(30)
    assert asked == list(range(20))


def test_what_takes_long_ends_with_the_block() -> None:
    is_busy, may_end = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        while not may_end.wait(0.01):
            is_busy.set()
            check_waited_for()

    giving_up = threading.Timer(20, may_end.set)
    giving_up.start()
    with ahead(numbers()) as ready:
        assert next(ready) == 1
        assert is_busy.wait(20)
        check_waited_for()  # here nobody has to wait
    giving_up.cancel()
    assert not may_end.is_set()


def test_ctrl_c_again_while_a_write_is_waited_for_leaves_no_thread_behind() -> None:
    may_end = threading.Event()

    def press(count: int) -> None:
        for _ in range(count):
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # raised here, it would wake none

    pressing = threading.Thread(target=press, args=(2,))
    later: Behind[int] = Behind(lambda item: may_end.wait(30))

    def write() -> None:
        with later:
            pressing.start()
            for number in range(10):
                later(number)

    with pytest.raises(KeyboardInterrupt):
        write()
    pressing.join()
    may_end.set()
    later._thread.join(10)
    assert not later._thread.is_alive()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda: ahead(iter([1])).__enter__(), id="ahead"),
        pytest.param(lambda: Behind(print).__enter__(), id="behind"),
        pytest.param(lambda: Scorer.open(threads=1), id="a scorer"),
    ],
)
def test_where_the_system_gives_no_thread_the_error_says_what_limits_them(
    use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ScoringError, match=r"^no thread can be started: can't start new thread; .*ulimit -u"):
        use()


class Interrupted(BaseException):
    """What a signal's handler raises."""


def use_behind() -> Iterator[None]:
    with Behind[int](lambda item: None) as later:
        yield
        later(1)
        later(2)
        yield


def use_ahead() -> Iterator[None]:
    with ahead(iter(range(9))) as ready:
        yield
        next(ready)
        next(ready)
        yield


def is_interrupted(use: Callable[[], Iterator[None]], place: int) -> bool:
    """Interrupt a use of a thread at a step of Python's code, between its yields. False if there are less steps."""
    files, steps = {queue.__file__, threading.__file__, overlap.__file__}, 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename in files:
            steps += 1
            if steps > place:
                raise Interrupted
        return step

    def run() -> None:
        with contextlib.suppress(Interrupted):
            for number, _ in enumerate(use()):
                sys.settrace(step if number == 0 else None)
        sys.settrace(None)

    user = threading.Thread(target=run, daemon=True)
    user.start()
    user.join(10)
    assert not user.is_alive(), f"it never ends when it is interrupted at step {place}"
    return steps > place


@pytest.mark.parametrize("use", [use_behind, use_ahead])
def test_a_signal_at_any_step_leaves_no_thread_that_waits_for_ever(use: Callable[[], Iterator[None]]) -> None:
    place = 0
    while is_interrupted(use, place):
        place += 1
    assert place > 3
