"""Keep each process of a parallel test run on one core. The engine's tests use all cores: they do not import this."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Keep this process on one core, with all that it starts.

    A session then has one thread, unless the test asks for more. With two threads, which other processes kept waiting,
    an export took a quarter to a third more CPU time.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(usable)[int(worker.removeprefix("gw")) % len(usable)]})
    yield
    os.sched_setaffinity(0, usable)
