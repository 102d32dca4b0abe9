"""A scorer that was opened before a fork works in the child, or says at once that it cannot; it never hangs."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from cappy_engine import Scorer
from cappy_engine.batching import Scores
from cappy_engine.dispatcher import LazySession
from cappy_engine.errors import ScoringError
from cappy_engine.forking import tell_after_fork
from cappy_engine.gpu.sessions import SharedSession
from cappy_engine.inputs import full_batch
from cappy_engine.session import Inputs, open_session
from cappy_engine.testing import FakeSession
from tests.support.places import TINY
from tests.support.processes import in_a_fork

SCRIPT = """
import os, signal, sys, threading
from cappy_engine import Scorer

mode, use, end = sys.argv[1:]
pairs = [("Is the sky blue?", f"I would say so{' indeed' * count}.") for count in range(40)]
scorer = Scorer.open(sys.argv[0], precision="int8", device="cpu", threads=2, mode=mode)
expected = Scorer.open(sys.argv[0], precision="int8", device="cpu", threads=1).score(pairs)
is_over = threading.Event()

def score_on():
    while not is_over.is_set():
        scorer.score(pairs)

busy = threading.Thread(target=score_on)
if use == "busy":
    busy.start()
if use != "unused":
    scorer.score(pairs)
child = os.fork()
if child == 0:
    signal.alarm(30)
    scores = scorer.score(pairs) if end != "idle" else expected
    alone = scorer.rank("Is the sky blue?", ["Yes", "No", "Maybe"], exact_winner=True) if end == "rank" else None
    if end == "close":
        scorer.close()
    sys.exit(0 if abs(scores - expected).max() < 1e-5 else 3)
status = os.waitpid(child, 0)[1]
is_over.set()
if use == "busy":
    busy.join()
print(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "use", "end"),
    [
        ("latency", "unused", "score"),
        ("both", "used", "close"),
        ("both", "busy", "rank"),
        ("throughput", "used", "score"),
        ("latency", "unused", "idle"),
    ],
)
def test_a_child_scores_as_its_parent_and_ends(mode: str, use: str, end: str) -> None:
    script = SCRIPT.replace("sys.argv[0]", repr(str(TINY)))
    python = [sys.executable, "-W", "ignore:This process:DeprecationWarning"]  # Python 3.12 warns of forks with threads
    done = subprocess.run(
        [*python, "-c", script, mode, use, end], capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_session_that_cannot_be_opened_again_says_so_in_the_child() -> None:
    session = open_session(TINY / "onnx" / "model.onnx", threads=2)
    batch = full_batch(1, 8, pad_token_id=1)
    session.run(batch)

    def run() -> str:
        with pytest.raises(ScoringError, match="opened on cpu before the process forked; open the scorer after the"):
            session.run(batch)
        return "said"

    assert in_a_fork(run) == "said"
    assert session.run(batch).shape == (1,)


def test_locks_and_gpus_that_a_thread_holds_at_the_fork_are_free_in_the_child() -> None:
    held, is_over = threading.Event(), threading.Event()

    class Waiting(FakeSession):
        def run(self, inputs: Inputs) -> Scores:
            if threading.current_thread() is not threading.main_thread():
                held.set()
                is_over.wait(30)
            return super().run(inputs)

    shared = SharedSession({0: Waiting()}, device="cuda")
    lazy = LazySession(FakeSession)
    lazy._lock.acquire()  # as another thread does that opens it
    scorer = Scorer.open(TINY, precision="int8", device="cpu", threads=1)
    scorer.exact._lock.acquire()  # likewise
    batch = full_batch(1, 8, pad_token_id=1)
    thread = threading.Thread(target=lambda: shared.run(batch))
    thread.start()
    assert held.wait(30)
    assert in_a_fork(lambda: str(shared.run(batch).shape + lazy.run(batch).shape)) == "(1, 1)"
    assert in_a_fork(lambda: str(len(scorer.exact.run(scorer.encode([("Is it?", "Yes")]))))) == "1"
    lazy._lock.release()
    scorer.exact._lock.release()
    scorer.close()
    is_over.set()
    thread.join()


def test_a_child_that_was_forked_while_another_thread_freed_a_scorer_uses_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half freed, that one could not be told of the fork, nor could the others then."""
    freeing, is_over = threading.Event(), threading.Event()

    def give_back() -> None:
        freeing.set()
        is_over.wait(30)

    kept = [Scorer.open(TINY, precision="int8", device="cpu", threads=2) for _ in range(3)]
    expected = [scorer.score([("Is it?", "Yes")]).tolist() for scorer in kept]
    freed = Scorer.open(TINY, precision="int8", device="cpu", threads=1)
    shown: list[BaseException | None] = []
    with monkeypatch.context() as patch:
        patch.setattr("cappy_engine.session.give_memory_back", give_back)
        thread = threading.Thread(target=freed.close)
        thread.start()
        assert freeing.wait(30)
        patch.setattr("sys.unraisablehook", lambda failed: shown.append(failed.exc_value))
        found = in_a_fork(lambda: str(([scorer.score([("Is it?", "Yes")]).tolist() for scorer in kept], shown)))
        is_over.set()
        thread.join()
    assert found == str((expected, []))


class Told:
    """Is told of a fork; fails there if it `is_broken`."""

    def __init__(self, *, is_broken: bool) -> None:
        self.is_told = False
        self._is_broken = is_broken
        tell_after_fork(self)

    def after_fork(self) -> None:
        self.is_told = True
        if self._is_broken:
            raise ValueError("broken in the child")


def test_one_object_that_fails_after_a_fork_keeps_no_other_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    things = [Told(is_broken=place % 3 == 0) for place in range(9)]
    shown: list[BaseException | None] = []
    monkeypatch.setattr("sys.unraisablehook", lambda failed: shown.append(failed.exc_value))

    def tell() -> str:
        (error,) = shown
        assert isinstance(error, ExceptionGroup)
        return f"{sum(thing.is_told for thing in things)} told, {len(error.exceptions)} failed: {error}"

    told = in_a_fork(tell)
    assert told == "9 told, 3 failed: some objects do not work in this forked child (3 sub-exceptions)"
    assert not any(thing.is_told for thing in things)
