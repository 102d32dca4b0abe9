"""Work beside other work ends with its block, whatever comes in between."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from cappy_engine.overlap import Behind, ahead


def test_all_is_done_in_order_when_the_block_ends() -> None:
    done: list[int] = []
    with Behind(done.append) as later:
        for number in range(20):
            later(number)
    assert done == list(range(20))
    with ahead(iter(range(20))) as ready:
        assert list(ready) == list(range(20))


def test_ctrl_c_again_while_a_write_is_waited_for_leaves_no_thread_behind() -> None:
    may_end = threading.Event()

    def press(count: int) -> None:
        for _ in range(count):
            time.sleep(0.2)
            signal.raise_signal(signal.SIGINT)  # which the main thread sees

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
