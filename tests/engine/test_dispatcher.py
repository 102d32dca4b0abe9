"""Batches run beside each other where that pays, as planned, and are put back in order."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cappy_engine.batching import EncodedPairs, Grouping, Padding, Scores, keeps_busy
from cappy_engine.dispatcher import CLOSED, Dispatcher, LazySession
from cappy_engine.errors import ScoringError
from cappy_engine.scorer import Scorer
from cappy_engine.session import Inputs
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer
from tests.support.places import parity_pairs

FEW = parity_pairs()[::6]


class ThreadsSession(FakeSession):
    """Scores a row by its number of tokens, and remembers the threads that ran batches."""

    def __init__(self) -> None:
        super().__init__(lambda ids: float(len(ids)))
        self.threads: set[str] = set()

    def run(self, inputs: Inputs) -> Scores:
        self.threads.add(threading.current_thread().name)
        return super().run(inputs)


def encoded(lengths: list[int]) -> EncodedPairs:
    ids = [np.full(length, 7, dtype=np.int64) for length in lengths]
    types = [np.zeros(length, dtype=np.int64) for length in lengths]
    return EncodedPairs(ids, types, np.array(lengths, dtype=np.int64), np.zeros(len(lengths), dtype=np.bool_))


def test_uneven_batches_run_one_after_the_other_though_larger_ones_would_be_even() -> None:
    """The plan for four workers wastes too much, so batches are cut anew for all threads on one batch.

    Those look even; when the decision was taken again from them, they ran beside each other.
    """
    wide, narrow = ThreadsSession(), ThreadsSession()
    dispatcher = Dispatcher(wide, Grouping(512, "avoided"), pad_token_id=1, narrow_session=narrow, callers=4)
    pairs = encoded([241] * 6 + [223, 223, 184])
    plan = dispatcher.plan(pairs.lengths)
    assert not plan.is_shared
    scores = dispatcher.run(pairs)
    dispatcher.close()
    assert (len(wide.batches), len(narrow.batches)) == (len(plan.batches), 0)
    assert scores.tolist() == pairs.lengths.tolist()


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 512), max_size=60),
    budget=st.integers(1, 2000),
    padding=st.sampled_from(("removed", "avoided", "allowed")),
    callers=st.integers(1, 4),
    has_wide=st.booleans(),
)
def test_a_run_does_what_its_plan_says(
    lengths: list[int], budget: int, padding: Padding, callers: int, has_wide: bool
) -> None:
    narrow = ThreadsSession()
    wide = ThreadsSession() if has_wide else narrow
    dispatcher = Dispatcher(wide, Grouping(budget, padding), pad_token_id=1, narrow_session=narrow, callers=callers)
    pairs = encoded(lengths)
    plan = dispatcher.plan(pairs.lengths)
    told: list[int] = []
    scores = dispatcher.run(pairs, progress=lambda batch: told.append(len(batch.rows)))
    dispatcher.close()
    assert scores.tolist() == lengths
    assert told == [len(batch.rows) for batch in plan.batches]
    own = {name for name in narrow.threads if name.startswith("cappy")}
    assert bool(own) == plan.is_shared
    if has_wide:
        assert (len(wide.batches), len(narrow.batches)) == ((0, len(told)) if plan.is_shared else (len(told), 0))
        assert not plan.is_shared or keeps_busy(plan.batches, pairs.lengths, callers)


def test_a_session_that_is_opened_late_is_opened_once() -> None:
    opened: list[ThreadsSession] = []

    def open_now() -> ThreadsSession:
        opened.append(ThreadsSession())
        return opened[-1]

    dispatcher = Dispatcher(LazySession(open_now), Grouping(100), pad_token_id=1)
    assert not opened
    for _ in range(2):
        dispatcher.run(encoded([3, 4]))
    assert [len(session.batches) for session in opened] == [2]


def test_a_closed_runner_runs_nothing() -> None:
    session = ThreadsSession()
    dispatcher = Dispatcher(session, Grouping(100), pad_token_id=1, narrow_session=session, callers=2)
    dispatcher.close()
    with pytest.raises(ScoringError, match="was closed"):
        dispatcher.run(encoded([3] * 100))
    assert session.batches == []


def test_closing_waits_for_no_batch_and_ends_the_threads_behind_it() -> None:
    """A signal handler may close, in the midst of what the threads wait for."""
    begun, may_end = threading.Semaphore(0), threading.Event()

    class Held(ThreadsSession):
        def run(self, inputs: Inputs) -> Scores:
            begun.release()
            may_end.wait(30)
            return super().run(inputs)

    session, before = Held(), set(threading.enumerate())
    dispatcher = Dispatcher(session, Grouping(10), pad_token_id=1, narrow_session=session, callers=2)
    errors: list[ScoringError] = []

    def run() -> None:
        try:
            dispatcher.run(encoded([10] * 5))
        except ScoringError as error:
            errors.append(error)

    caller = threading.Thread(target=run)
    caller.start()
    assert all(begun.acquire(timeout=30) for _ in range(2))
    dispatcher.close()
    assert session.batches == []
    may_end.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()
    assert len(session.batches) == 2
    assert [error.problem for error in errors] == [CLOSED]


def test_equal_pairs_are_kept_once_and_found_again() -> None:
    pairs = encoded([3, 5, 3, 5, 4])
    distinct, places = pairs.distinct()
    assert distinct.lengths.tolist() == [3, 5, 4]
    assert places.tolist() == [0, 1, 0, 1, 2]
    assert distinct.lengths[places].tolist() == pairs.lengths.tolist()


def test_pairs_that_differ_in_where_the_second_text_begins_are_not_equal() -> None:
    """BERT: ("x [SEP] y", "z") and ("x", "y [SEP] z") have the same token ids, and other token type ids."""
    ids = [np.arange(6, dtype=np.int64)] * 3
    types = [np.repeat(np.array([0, 1], dtype=np.int64), (zeros, 6 - zeros)) for zeros in (2, 4, 2)]
    pairs = EncodedPairs(ids, types, np.full(3, 6), np.zeros(3, dtype=np.bool_))
    distinct, places = pairs.distinct()
    assert [row.tolist() for row in distinct.type_ids] == [row.tolist() for row in types[:2]]
    assert places.tolist() == [0, 1, 0]


def test_pairs_of_several_calls_are_joined_as_if_they_came_in_one(tokenizer: PairTokenizer) -> None:
    pairs = [("a", "b"), ("", "c"), ("word " * 600, "d"), ("e", "f"), ("", "")]
    parts = [tokenizer.encode(pairs[start:end]) for start, end in ((0, 2), (2, 2), (2, 4), (4, 5))]
    joined, whole = EncodedPairs.joined(parts), tokenizer.encode(pairs)
    for name in ("token_ids", "type_ids", "lengths", "truncated"):
        assert list(map(str, getattr(joined, name))) == list(map(str, getattr(whole, name)))
    assert joined.without_instruction == whole.without_instruction == (1, 4)
    assert joined.tokenizer == whole.tokenizer


# Beside each other


class Recorder(FakeSession):
    """Also remembers which thread ran each batch, fails on one that holds `bad`, and at first waits for two others."""

    def __init__(self, bad: list[int] | None = None) -> None:
        super().__init__()
        self.threads: set[str] = set()
        self._bad = bad
        self._others = threading.Barrier(3)

    def run(self, inputs: Inputs) -> Scores:
        name = threading.current_thread().name
        if name not in self.threads:
            self.threads.add(name)
            self._others.wait(timeout=30)  # breaks if batches ran one after the other
        if self._bad is not None and self._bad in [row.tolist()[: len(self._bad)] for row in inputs["input_ids"]]:
            raise ScoringError("this batch is bad")
        return super().run(inputs)


def with_callers(tokenizer: PairTokenizer, wide: FakeSession, narrow: FakeSession) -> Scorer:
    return Scorer(tokenizer, Dispatcher(wide, Grouping(100), pad_token_id=1, narrow_session=narrow, callers=3))


def test_several_batches_run_beside_each_other_and_one_alone_has_all_threads(tokenizer: PairTokenizer) -> None:
    wide, narrow = FakeSession(), Recorder()
    with with_callers(tokenizer, wide, narrow) as opened:
        scores = opened.score(FEW)
        assert not wide.batches
        assert len(narrow.batches) > 3
        assert len(narrow.threads) == 3
        opened.score(FEW[:1])
        assert len(wide.batches) == 1
    np.testing.assert_array_equal(scores, fake_scorer(tokenizer=tokenizer).score(FEW))


def test_where_no_session_has_all_threads_uneven_batches_run_beside_each_other_too(tokenizer: PairTokenizer) -> None:
    narrow = Recorder()
    with with_callers(tokenizer, narrow, narrow) as opened:
        opened.score([("word " * 90, "a"), ("word " * 30, "b"), ("c", "d")])
    assert len(narrow.threads) == 3


def test_an_error_in_one_of_several_batches_is_raised(tokenizer: PairTokenizer) -> None:
    bad = tokenizer.encode(FEW[3:4]).token_ids[0].tolist()
    with (
        with_callers(tokenizer, FakeSession(), Recorder(bad)) as opened,
        pytest.raises(ScoringError, match="this batch is bad"),
    ):
        opened.score(FEW)
