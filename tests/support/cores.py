"""Give each process of a parallel test run a core of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Let this process, and those that it starts, use one core only, if others run tests beside it.

    A session then has one thread, where the test asks for no other number. Two threads on a core that others use, too,
    wait for each other, which takes a quarter to a third more of the cores' time.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(usable)[int(worker.removeprefix("gw")) % len(usable)]})
    yield
    os.sched_setaffinity(0, usable)
