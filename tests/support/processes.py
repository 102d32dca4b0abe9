"""Run a function in a forked child, with a limit of time."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

SECONDS = 30


def in_a_fork(run: Callable[[], str]) -> str:
    """Return what `run` returns in a child of this process, or its traceback; the child is killed if it hangs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            text = run()
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    text = b"".join(iter(lambda: os.read(read, 65536), b"")).decode()
    os.close(read)
    status = os.waitpid(child, 0)[1]
    return text if status == 0 else f"the child ended with status {status}"
