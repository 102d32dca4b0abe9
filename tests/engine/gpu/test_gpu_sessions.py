"""Sessions made of sessions: runs are shared by GPUs, and go to the engine of their length."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cappy_engine.batching import Scores
from cappy_engine.errors import ScoringError
from cappy_engine.gpu.sessions import BucketedSession, SharedSession
from cappy_engine.inputs import full_batch
from cappy_engine.session import Inputs
from cappy_engine.testing import score_of
from tests.support.gpus import (
    TOKENS,
    PlacedSession,
    fails_on,
    inputs_of,
)


class Meeting(PlacedSession):
    """A run ends only while another GPU's goes on too; one that holds a row of 5 tokens fails at once."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__("cuda", fails_on(5))
        self._barrier = barrier

    def run(self, inputs: Inputs) -> Scores:
        scores = super().run(inputs)
        self._barrier.wait(timeout=30)  # breaks if this GPU runs alone
        return scores


def test_a_run_that_fails_is_not_repeated_on_the_other_gpu_and_both_are_free_afterwards() -> None:
    barrier = threading.Barrier(2)
    sessions = [Meeting(barrier), Meeting(barrier)]
    shared = SharedSession({3: sessions[0], 1: sessions[1]}, device="cuda")
    for runs, gpu in ((1, 3), (2, 1), (3, 3)):
        with pytest.raises(ScoringError, match=f"^GPU {gpu}: out of GPU memory"):
            shared.run(inputs_of([TOKENS[0]]))
        assert sum(len(session.batches) for session in sessions) == runs
    with ThreadPoolExecutor(2) as callers:
        scores = list(callers.map(lambda ids: float(shared.run(inputs_of([ids]))[0]), TOKENS[1:3]))
    np.testing.assert_allclose(scores, [score_of(ids) for ids in TOKENS[1:3]], atol=1e-6)


def test_two_gpus_run_at_the_same_time() -> None:
    barrier = threading.Barrier(2)
    sessions = [Meeting(barrier), Meeting(barrier)]
    shared = SharedSession(dict(enumerate(sessions)), device="cuda")
    with ThreadPoolExecutor(2) as callers:
        runs = [callers.submit(shared.run, inputs_of([[0, number, 2]])) for number in range(10, 30)]
        scores = [float(run.result(timeout=30)[0]) for run in runs]
    np.testing.assert_allclose(scores, [score_of([0, number, 2]) for number in range(10, 30)], atol=1e-6)
    assert [len(session.batches) for session in sessions] == [10, 10]


class Gated(PlacedSession):
    """Says when a run begins, ends it when the gate opens, and counts how many there are at once."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__("cuda")
        self.most = 0
        self.has_begun = threading.Event()
        self._gate = gate
        self._inside = 0
        self._lock = threading.Lock()

    def run(self, inputs: Inputs) -> Scores:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        self.has_begun.set()
        assert self._gate.wait(timeout=30)
        with self._lock:
            self._inside -= 1
        return super().run(inputs)


def test_a_run_waits_where_no_gpu_is_free() -> None:
    gate = threading.Event()
    sessions = [Gated(gate), Gated(gate)]
    shared = SharedSession(dict(enumerate(sessions)), device="cuda")
    with ThreadPoolExecutor(6) as callers:
        runs = [callers.submit(shared.run, inputs_of([ids])) for ids in TOKENS[:2]]
        assert all(session.has_begun.wait(timeout=30) for session in sessions)
        runs += [callers.submit(shared.run, inputs_of([ids])) for ids in TOKENS[2:]]
        with pytest.raises(TimeoutError):
            runs[2].result(timeout=0.05)
        gate.set()
        scores = [float(run.result(timeout=30)[0]) for run in runs]
    np.testing.assert_allclose(scores, [score_of(ids) for ids in TOKENS], atol=1e-6)
    assert [session.most for session in sessions] == [1, 1]


def test_a_gpu_that_is_held_runs_all_of_a_block_and_nothing_else() -> None:
    sessions = {0: PlacedSession("cuda"), 1: PlacedSession("cuda")}
    shared = SharedSession(sessions, device="cuda")
    with shared.hold() as own:
        for ids in TOKENS:
            own.run(inputs_of([ids]))
            shared.run(inputs_of([ids]))
    assert [len(session.batches) for session in sessions.values()] == [len(TOKENS)] * 2
    assert own is sessions[0]


def test_each_gpu_can_be_asked_and_waits_until_it_is_free() -> None:
    sessions = {3: PlacedSession("cuda"), 1: PlacedSession("cuda", fails_on(5))}
    shared = SharedSession(sessions, device="cuda")
    third, first = shared.each()
    assert third.run(inputs_of([TOKENS[0]])) == pytest.approx(score_of(TOKENS[0]))
    with pytest.raises(ScoringError, match=r"^GPU 1: out of GPU memory"):
        first.run(inputs_of([TOKENS[0]]))
    with ThreadPoolExecutor(1) as caller:
        with shared.hold(1):
            waiting = caller.submit(first.run, inputs_of([TOKENS[1]]))
            assert third.run(inputs_of([TOKENS[1]])) == pytest.approx(score_of(TOKENS[1]))
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.05)
        assert waiting.result(timeout=30) == pytest.approx(score_of(TOKENS[1]))
    assert [len(session.batches) for session in sessions.values()] == [2, 2]


# Buckets


@pytest.mark.parametrize(("rows", "length"), [(3, 20), (1, 8), (1, 64), (9, 16), (5, 32)])
def test_a_shape_that_no_engine_was_built_for_is_refused_and_not_run(rows: int, length: int) -> None:
    sessions = {16: PlacedSession("tensorrt"), 32: PlacedSession("tensorrt")}
    bucketed = BucketedSession(sessions, {16: 8, 32: 4}, device="tensorrt")
    with pytest.raises(ScoringError, match=f"takes {rows} x {length} tokens; .* up to 8 x 16, 4 x 32: score with the"):
        bucketed.run(full_batch(rows, length, pad_token_id=1))
    assert not any(session.batches for session in sessions.values())


def test_a_batch_runs_on_the_engine_of_its_length() -> None:
    sessions = {16: PlacedSession("tensorrt"), 32: PlacedSession("tensorrt")}
    bucketed = BucketedSession(sessions, {16: 8, 32: 4}, device="tensorrt")
    for rows, length in ((4, 32), (8, 16), (1, 16)):
        assert bucketed.run(full_batch(rows, length, pad_token_id=1)).shape == (rows,)
    assert {bucket: session.shapes for bucket, session in sessions.items()} == {16: [(8, 16), (1, 16)], 32: [(4, 32)]}
