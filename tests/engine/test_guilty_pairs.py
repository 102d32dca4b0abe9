"""A pair that fails in the model is named, and never blamed for a broken device, for memory or a passing fault."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cappy_engine.batching import Grouping, Scores
from cappy_engine.dispatcher import Dispatcher
from cappy_engine.errors import InvalidLine, InvalidPair, ParityError, ScoringError
from cappy_engine.gpu.sessions import BucketedSession, SharedSession
from cappy_engine.scorer import Scorer
from cappy_engine.session import Inputs
from cappy_engine.testing import FakeSession, fake_scorer, score_of
from cappy_engine.tokenizer import PairTokenizer

PAIRS = [("Name a fruit.", f"A pear and {count} apples{' too' * count}.") for count in range(40)]
GUILTY = ("Name a fruit.", "Durian!")


def failing_on(tokenizer: PairTokenizer, pair: tuple[str, str], problem: str = "id out of range") -> FakeSession:
    bad = tokenizer.encode([pair]).token_ids[0].tolist()

    def score(ids: Sequence[int]) -> float:
        if ids == bad:
            raise ScoringError(problem)
        return score_of(ids)

    return FakeSession(score)


class Limited(FakeSession):
    """Has memory for a few rows at a time."""

    def run(self, inputs: Inputs) -> Scores:
        if len(inputs["input_ids"]) > 4:
            raise ScoringError("out of memory")
        return super().run(inputs)


@pytest.mark.parametrize("budget", [1, 100, 100_000])
@pytest.mark.parametrize("callers", [1, 3])
@pytest.mark.parametrize("at", [0, 17, 40])
def test_the_guilty_pair_of_a_failing_batch_is_named(
    tokenizer: PairTokenizer, at: int, callers: int, budget: int
) -> None:
    session = failing_on(tokenizer, GUILTY)
    dispatcher = Dispatcher(session, Grouping(budget), pad_token_id=1, narrow_session=session, callers=callers)
    pairs = [*PAIRS[:at], GUILTY, *PAIRS[at:], GUILTY]
    with Scorer(tokenizer, dispatcher) as scorer, pytest.raises(ScoringError) as caught:
        scorer.score([PAIRS[0], PAIRS[0], *pairs])  # what comes twice is computed once: places are those of the input
    assert caught.value.index == at + 2
    assert str(caught.value) == f"pair {at + 2}: id out of range"


def test_a_guilty_candidate_is_named_by_its_place(tokenizer: PairTokenizer) -> None:
    with pytest.raises(ScoringError, match=r"^pair 1: id out of range"):
        fake_scorer(failing_on(tokenizer, GUILTY), tokenizer=tokenizer).rank(GUILTY[0], ["A pear.", GUILTY[1]])


def test_nothing_is_run_twice_while_nothing_fails(tokenizer: PairTokenizer) -> None:
    session = FakeSession()
    fake_scorer(session, tokenizer=tokenizer).score(PAIRS)
    assert sum(len(batch["input_ids"]) for batch in session.batches) == len(PAIRS)


@pytest.mark.parametrize(
    "session",
    [
        pytest.param(lambda: FakeSession(fails_at=0), id="a broken device"),
        pytest.param(lambda: FakeSession(fails_at=2), id="a device that breaks"),
        pytest.param(lambda: FakeSession(lambda ids: float("nan")), id="a broken model"),
        pytest.param(Limited, id="no memory"),
    ],
)
@pytest.mark.parametrize("pairs", [PAIRS, PAIRS * 3], ids=["once", "again and again"])
def test_no_pair_is_blamed_for_a_broken_device(
    tokenizer: PairTokenizer, session: Callable[[], FakeSession], pairs: list[tuple[str, str]]
) -> None:
    with pytest.raises(ScoringError, match=r"told to fail|gave nan|out of memory") as caught:
        fake_scorer(session(), tokenizer=tokenizer).score(pairs)
    assert caught.value.index is None


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 10])
@pytest.mark.parametrize("broken", [0, 1])
def test_no_pair_is_blamed_for_a_broken_gpu_beside_a_right_one(
    tokenizer: PairTokenizer, rows: int, broken: int
) -> None:
    shared = SharedSession({gpu: FakeSession(fails_at=0 if gpu == broken else None) for gpu in (0, 1)}, device="cuda")
    dispatcher = Dispatcher(shared, Grouping(10**6), pad_token_id=1, narrow_session=shared, callers=2)
    errors = []
    with Scorer(tokenizer, dispatcher) as scorer:
        for _ in range(2):  # at least one of them runs on the broken GPU
            try:
                scorer.score(PAIRS[:rows])
            except ScoringError as error:
                errors.append(error)
    assert errors
    assert {(str(error), error.index) for error in errors} == {(f"GPU {broken}: this session was told to fail", None)}


def test_the_guilty_pair_is_named_whichever_gpu_finds_it(tokenizer: PairTokenizer) -> None:
    shared = SharedSession({gpu: failing_on(tokenizer, GUILTY) for gpu in (0, 1)}, device="cuda")
    dispatcher = Dispatcher(shared, Grouping(200), pad_token_id=1, narrow_session=shared, callers=2)
    with Scorer(tokenizer, dispatcher) as scorer:
        for _ in range(4):
            with pytest.raises(ScoringError, match=r"^pair 17: id out of range$"):
                scorer.score([*PAIRS[:17], GUILTY, *PAIRS[17:]])


@pytest.mark.parametrize("pairs", [1, 3])
def test_no_pair_is_blamed_for_a_broken_engine_of_its_length(tokenizer: PairTokenizer, pairs: int) -> None:
    bucketed = BucketedSession({16: FakeSession(), 512: FakeSession(fails_at=0)}, {16: 4, 512: 4}, device="tensorrt")
    dispatcher = Dispatcher(bucketed, Grouping(2048, "avoided", (16, 512)), pad_token_id=1)
    with (
        Scorer(tokenizer, dispatcher) as scorer,
        pytest.raises(ScoringError, match=r"^this session was told") as caught,
    ):
        scorer.score(PAIRS[-pairs:])
    assert caught.value.index is None


@pytest.mark.parametrize("works_again", range(1, 8))
def test_no_pair_is_blamed_for_a_device_that_works_between_failures(tokenizer: PairTokenizer, works_again: int) -> None:
    class Flickering(FakeSession):
        runs = 0

        def run(self, inputs: Inputs) -> Scores:
            self.runs += 1
            if self.runs != 1 + works_again:
                raise ScoringError("device lost")
            return super().run(inputs)

    with pytest.raises(ScoringError, match=r"^device lost$") as caught:
        fake_scorer(Flickering(), tokenizer=tokenizer, max_batch_tokens=10**6).score(PAIRS[:2])
    assert caught.value.index is None


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1]], ids=["a batch", "a pair alone"])
def test_no_pair_is_blamed_for_a_fault_that_passes(tokenizer: PairTokenizer, pairs: list[tuple[str, str]]) -> None:
    class Once(FakeSession):
        has_failed = False

        def run(self, inputs: Inputs) -> Scores:
            if not self.has_failed:
                self.has_failed = True
                raise ScoringError("a bit flipped")
            return super().run(inputs)

    with pytest.raises(ScoringError, match=r"^a bit flipped$") as caught:
        fake_scorer(Once(), tokenizer=tokenizer).score(pairs)
    assert caught.value.index is None


def test_with_buckets_the_made_up_pair_has_a_length_that_an_engine_takes(tokenizer: PairTokenizer) -> None:
    session = failing_on(tokenizer, GUILTY)
    bucketed = BucketedSession({16: session, 512: session}, {16: 4, 512: 1}, device="tensorrt")
    dispatcher = Dispatcher(bucketed, Grouping(64, "avoided", (16, 512)), pad_token_id=1)
    with Scorer(tokenizer, dispatcher) as scorer, pytest.raises(ScoringError) as caught:
        scorer.score([PAIRS[0], GUILTY])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    "error",
    [
        InvalidPair(3, "is not a pair"),
        InvalidLine(3, "is not JSON"),
        ScoringError("failed"),
        ScoringError("failed", 3),
        ParityError("too far", {"max_error": 1.0}),
    ],
    ids=repr,
)
def test_errors_survive_the_way_out_of_another_process(error: Exception) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_the_first_of_several_guilty_pairs_of_a_batch_is_named(tokenizer: PairTokenizer) -> None:
    pairs = [("Is it?", "Yes"), ("Is it?", "Yes it is so"), ("Is it?", "No"), ("Is it?", "Never it is so")]
    lengths = tokenizer.encode(pairs).lengths
    session = FakeSession(lambda ids: np.nan if len(ids) == lengths[1] else 0.5)
    with pytest.raises(ScoringError) as caught:
        fake_scorer(session, tokenizer=tokenizer).score(pairs)
    assert caught.value.index == 1
