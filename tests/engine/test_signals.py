"""A signal handler may raise or close the scorer wherever it comes: what it raises is not taken for a failure.

Celery and RQ end so what takes too long. `signalled` sends the signal at a chosen call, of a Python function or of C's.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cappy_engine import Scorer
from cappy_engine.batching import EncodedPairs, Grouping
from cappy_engine.cpu.kernels import find_kernels, self_test
from cappy_engine.cpu.tuned import read_tuned
from cappy_engine.dispatcher import CLOSED, Dispatcher
from cappy_engine.errors import BundleError, ScoringError, is_callers
from cappy_engine.inputs import full_batch
from cappy_engine.native.library import NativeLibrary
from cappy_engine.session import give_memory_back, load_runtime, open_session
from cappy_engine.testing import FakeSession
from tests.support.places import TINY
from tests.support.processes import in_a_fork

PAIRS = [("Is the sky blue?", f"I would say so{' indeed' * count}.") for count in range(40)]
MODEL = TINY / "onnx" / "model.onnx"


class TimeLimit(Exception):
    """What Celery's SoftTimeLimitExceeded and RQ's JobTimeoutException are: an Exception of the caller's own."""


LIMITS = (TimeLimit("180 s"), TimeoutError("180 s"), RuntimeError("180 s"))
limits = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: type(limit).__name__)


@contextlib.contextmanager
def handled(handler: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def signalled(at: int) -> Iterator[list[int]]:
    """Send SIGUSR1 at the call of this number, and count the calls and their ends in the list's only item."""
    counts = [0]

    def count(frame: object, event: str, argument: object) -> None:
        counts[0] += 1
        if counts[0] == at:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGUSR1)

    gc.disable()  # what is raised while an object is freed, also one of another test, is shown by Python and lost
    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(None)
        gc.enable()


def places(run: Callable[[], object], count: int, *, start: int = 1) -> range:
    """Choose at least so many of the places at which a signal may come while this runs."""
    with signalled(-1) as counts:
        run()
    return range(start, counts[0], max(1, (counts[0] - start) // count))


def stopped_by(limit: Exception, run: Callable[[], object], count: int, *, start: int = 1) -> None:
    """Hold that the limit ends the call as it is, wherever it comes."""

    def stop() -> None:
        raise limit

    chosen = places(run, count, start=start)
    assert len(chosen) >= count
    with handled(stop):
        for at in chosen:
            with pytest.raises(type(limit)) as caught, signalled(at):
                run()
            assert caught.value is limit, at


# Handlers that raise


@limits
def test_a_time_limit_ends_scoring_as_itself(limit: Exception) -> None:
    with Scorer.open(TINY, precision="int8", device="cpu", threads=1) as scorer:
        encoded = scorer.encode(PAIRS)
        expected = scorer.score_encoded(encoded).scores
        stopped_by(limit, lambda: scorer.score_encoded(encoded), 100)
        np.testing.assert_array_equal(scorer.score_encoded(encoded).scores, expected)


@limits
def test_a_time_limit_while_a_model_is_opened_blames_nothing(limit: Exception) -> None:
    chosen = find_kernels().chosen
    opened = [open_session(MODEL, threads=1)]  # none is freed meanwhile
    with signalled(-1) as counts:
        load_runtime()  # Python's importlib.metadata suppresses errors
    stopped_by(limit, lambda: opened.append(open_session(MODEL, threads=1, kernels=chosen)), 60, start=counts[0])
    assert opened[0].run(full_batch(1, 8, pad_token_id=1)).shape == (1,)


def test_a_time_limit_while_memory_is_given_back_is_not_lost() -> None:
    stopped_by(TimeoutError("180 s"), give_memory_back, 4)


@pytest.mark.slow
def test_a_time_limit_while_kernels_are_tested_does_not_switch_them_off() -> None:
    library = find_kernels().library
    if library is None:
        pytest.skip(f"needs the native library: {find_kernels().why_not}")
    stopped_by(TimeoutError("180 s"), lambda: self_test(NativeLibrary(library), "scalar"), 10)


def test_a_time_limit_of_the_systems_kind_does_not_make_an_answer_unreadable(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text('{"mode": "both", "max_batch_tokens": 9, "reason": "measured"}')
    stopped_by(TimeoutError("180 s"), lambda: read_tuned(tmp_path, "key"), 20)


IMPORTED = """
import signal, sys
from cappy_engine.session import load_runtime

def stop(*_):
    raise TimeoutError("180 s")

def watch(frame, event, argument):
    if event == "c_call" and argument.__name__ == "exec_dynamic" and "onnxruntime_pybind11" in str(frame.f_locals):
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_REAL, 0.0002)  # the C part, which takes longer, makes an ImportError of it

signal.signal(signal.SIGALRM, stop)
sys.setprofile(watch)
try:
    load_runtime()
except TimeoutError as error:
    print(error)
print(load_runtime().__name__)
"""


@pytest.mark.slow
def test_a_time_limit_while_onnx_runtime_is_imported_blames_no_installation() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("180 s\nonnxruntime\n", "")


def test_only_what_comes_from_elsewhere_is_the_callers(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match="cannot load") as caught:
        open_session(tmp_path / "model.onnx")
    assert caught.value.__cause__ is not None
    assert not is_callers(caught.value.__cause__)
    for error in (ValueError("of nobody"), FileNotFoundError(2, "of the system's")):
        assert not is_callers(error)
    assert is_callers(TimeLimit("raised nowhere"))


def test_a_wrapper_of_what_fails_is_not_a_signal_handler() -> None:
    """eventlet wraps os.open, PyInstaller ctypes.CDLL: in their functions an OSError says what it always says."""

    class WrappedError(OSError):
        pass

    def wrapped(kind: type[OSError]) -> None:
        raise kind(2, "no such file")

    for kind in (OSError, FileNotFoundError, WrappedError):
        with pytest.raises(OSError, match="no such file") as caught:
            wrapped(kind)
        assert not is_callers(caught.value)


def test_what_goes_through_the_type_of_an_unset_handler_is_not_the_callers() -> None:
    """signal.SIG_DFL is a member of an Enum: its type is called to look one up."""
    with pytest.raises(ValueError, match="is not a valid Handlers") as caught:
        signal.Handlers(12345)
    assert not is_callers(caught.value)


# Handlers that close


def encoded(count: int) -> EncodedPairs:
    ids = [np.full(50, 7, dtype=np.int64) for _ in range(count)]
    types = [np.zeros(50, dtype=np.int64) for _ in range(count)]
    return EncodedPairs(ids, types, np.full(count, 50), np.zeros(count, dtype=np.bool_))


def closed_at(at: int) -> bool:
    """Close a dispatcher in the midst of a run, on three threads; returns whether the run was over before."""
    session = FakeSession(lambda ids: float(len(ids)))
    dispatcher = Dispatcher(session, Grouping(50), pad_token_id=1, narrow_session=session, callers=3)
    with handled(dispatcher.close), signalled(at) as counts:
        with contextlib.suppress(ScoringError):
            assert dispatcher.run(encoded(5)).tolist() == [50.0] * 5
        if counts[0] < at:
            return True
    with pytest.raises(ScoringError, match=CLOSED):
        dispatcher.run(encoded(1))
    return False


@pytest.mark.slow
def test_a_handler_may_close_at_any_moment_of_a_run() -> None:
    def close() -> str:
        tried = next(at for at in itertools.count(1) if closed_at(at))
        return "closed everywhere" if tried > 100 else f"only {tried} places"

    assert in_a_fork(close) == "closed everywhere"


@pytest.mark.slow
def test_a_handler_may_close_while_the_exact_model_is_opened() -> None:
    def opened() -> Scorer:
        return Scorer.open(TINY, precision="int8", device="cpu", threads=1)

    def close() -> str:
        first, second = opened(), opened()
        second.exact.open()  # its modules are imported
        pairs, chosen = first.encode(PAIRS[:2]), places(first.exact.open, 20)
        for at in chosen:
            scorer = opened()
            with handled(scorer.close), signalled(at) as counts, contextlib.suppress(ScoringError):
                scorer.exact.run(pairs)
            assert counts[0] == at
            for run in (scorer.exact.open, lambda scorer=scorer: scorer.exact.run(pairs)):
                with pytest.raises(ScoringError, match=CLOSED):
                    run()
        return f"closed at {len(chosen)} places"

    assert in_a_fork(close) in [f"closed at {count} places" for count in range(20, 40)]
