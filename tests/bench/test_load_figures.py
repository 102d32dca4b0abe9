"""What a load is made of, when it arrives, and how what came back is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cappy_bench.load.bodies import INFINITY, INFINITY_MODEL, NATIVE, Dialect
from cappy_bench.load.driving import HUNG, Exchange, Room, poisson_times
from cappy_bench.load.mix import Load, make_load
from cappy_bench.load.offline import _Scoring
from cappy_bench.load.outcomes import compare_scores, count_outcomes, latencies, quantile
from cappy_bench.load.serve_measure import queue_rooms
from cappy_bench.peers.peer import Pair
from cappy_bench.speed.texts import make_pool
from cappy_engine.bundle import EMBEDDED
from cappy_engine.errors import BenchmarkError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer
from cappy_engine.tokenizer import PairTokenizer

TEXTS = make_pool([f"word{place}" for place in range(50)], seed=0, count=300)


@pytest.fixture(scope="module")
def mini_tokenizer() -> PairTokenizer:
    return PairTokenizer.from_file(EMBEDDED / "tokenizer.json", max_length=512)


# When


def test_the_same_seed_gives_the_same_arrivals_and_another_one_others() -> None:
    times = poisson_times(50.0, 20.0, seed=3)
    assert times.tolist() == poisson_times(50.0, 20.0, seed=3).tolist()
    assert times.tolist() != poisson_times(50.0, 20.0, seed=4).tolist()


def test_arrivals_have_the_rate_and_the_independent_gaps_of_a_poisson_process() -> None:
    times = poisson_times(50.0, 400.0, seed=0)
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)  # 4 standard deviations
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05), "exponential gaps spread as far as their mean"
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03
    assert (gaps > 0).all()


@given(st.floats(0.01, 500), st.floats(0.01, 20), st.integers(0, 10))
def test_no_arrival_is_outside_of_the_time(rate: float, seconds: float, seed: int) -> None:
    times = poisson_times(rate, seconds, seed=seed)
    assert ((times > 0) & (times < seconds)).all()


# What


def test_a_load_is_the_same_for_a_seed_and_has_the_sizes_that_were_asked_for(mini_tokenizer: PairTokenizer) -> None:
    first, again, other = (
        make_load((TEXTS, "made up"), mini_tokenizer, sizes=(1, 4, 16), count=60, seed=seed) for seed in (0, 0, 1)
    )
    assert first.describe() == again.describe()
    assert first.describe()["sha256"] != other.describe()["sha256"]
    counts = first.describe()["requests_by_pairs"]
    assert list(counts) == ["1", "4", "16"]
    assert counts["1"] > counts["4"] > counts["16"], "the larger, the rarer"
    assert all(len({instruction for instruction, _ in request}) == 1 for request in first.requests)
    assert all(len(set(request)) == len(request) for request in first.requests)


def test_the_tokens_of_a_load_are_those_of_its_requests_and_no_pair_is_truncated(mini_tokenizer: PairTokenizer) -> None:
    load = make_load((TEXTS, "made up"), mini_tokenizer, sizes=(1, 4), count=20, seed=0)
    for request, tokens in zip(load.requests, load.tokens, strict=True):
        encoded = mini_tokenizer.encode(request)
        assert int(encoded.lengths.sum()) == tokens
        assert not encoded.truncated.any()


@pytest.mark.slow
def test_a_loads_sizes_and_lengths_are_those_that_it_promises(mini_tokenizer: PairTokenizer) -> None:
    sizes = (1, 4, 16, 64)
    texts = make_pool(["sky", "blue", "is", "the", "question", "answer", "why"], seed=0, count=2000)
    load = make_load((texts, "made up"), mini_tokenizer, sizes=sizes, count=400, seed=0)
    weights = np.array([1, 1 / 2, 1 / 4, 1 / 8])
    found = load.describe()
    shares = np.array([found["requests_by_pairs"][str(size)] for size in sizes]) / 400
    assert shares == pytest.approx(weights / weights.sum(), abs=0.06), "by the inverse of the square root"
    assert (found["requests"], found["pairs"], found["tokens"]) == (400, sum(load.sizes), load.tokens.sum())
    a_pair = load.tokens / np.array(load.sizes)
    is_single = np.array(load.sizes) == 1
    assert np.percentile(a_pair[is_single], 95) > 200, "as of bulk, whose 95th percentile is 300"
    assert a_pair[~is_single].max() < 200, "as of rerank, whose instructions have up to 150"


def test_no_pair_is_truncated_though_each_gets_the_response_of_another(mini_tokenizer: PairTokenizer) -> None:
    texts = [(" ".join(["sky"] * words), " ".join(["no"] * (60 if words < 400 else 1))) for words in range(1, 500)]
    load = make_load((texts, "made up"), mini_tokenizer, sizes=(1,), count=300, seed=1)
    encoded = mini_tokenizer.encode([pair for request in load.requests for pair in request])
    assert encoded.lengths.max() > 380
    assert not encoded.truncated.any()


def test_too_few_texts_are_an_error_that_says_how_many_there_are(mini_tokenizer: PairTokenizer) -> None:
    with pytest.raises(
        BenchmarkError, match="request of 64 pairs needs as many different responses, and the texts have 3 "
    ):
        make_load((TEXTS[:3], "three"), mini_tokenizer, sizes=(64,), count=1, seed=0)


def a_load(sizes: list[int], tokens: list[int]) -> Load:
    return Load(tuple(tuple([("a", "b")] * size) for size in sizes), np.array(tokens), "made up")


def test_a_queue_has_room_for_as_much_as_it_says() -> None:
    load = a_load([2, 3], [100, 150])
    assert queue_rooms(load, {"max_queue_pairs": 7, "max_queue_tokens": 900}) == [
        Room([2, 3], 7),
        Room([100, 150], 900),
    ]


# The scorer without a server


def test_the_scorer_gets_each_request_alone_or_all_their_pairs_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[Pair]] = []
    score = Scorer.score

    def watched(scorer: Scorer, pairs: Sequence[Pair]) -> object:
        calls.append(list(pairs))
        return score(scorer, pairs)

    monkeypatch.setattr(Scorer, "score", watched)
    scoring = _Scoring(EMBEDDED, ScorerOptions(threads=1, max_batch_tokens=64))
    assert scoring._scorer.info.max_batch_tokens == 64, "as the server was asked"
    requests = [[("a", "b")], [("c", "d"), ("c", "e")], [("f", "g")]]
    assert [len(row) for row in scoring.answer({"do": "open", "requests": requests})["scores"]] == [1, 2, 1]
    calls.clear()
    assert len(scoring.answer({"do": "each", "places": [1, 0]})["seconds"]) == 2
    assert calls == [requests[1], requests[0]]
    calls.clear()
    scoring.answer({"do": "all", "places": [2, 1]})
    assert calls == [[*requests[2], *requests[1]]]


# Bodies


@pytest.mark.parametrize(("dialect", "name"), [(NATIVE, "score"), (INFINITY, "relevance_score")])
def test_scores_are_read_in_the_order_of_the_pairs(dialect: Dialect, name: str) -> None:
    ranked = [{"index": 2, name: 0.9}, {"index": 0, name: 0.5}, {"index": 1, name: -0.1}]
    assert dialect.scores(json.dumps({"results": ranked}).encode()) == [0.5, -0.1, 0.9]
    for wrong in ([*ranked, ranked[0]], ranked[:2]):
        with pytest.raises((ValueError, KeyError)):
            dialect.scores(json.dumps({"results": wrong}).encode())


@pytest.mark.parametrize("dialect", [NATIVE, INFINITY])
def test_a_body_is_one_line_and_holds_the_texts(dialect: Dialect) -> None:
    body = dialect.body([("Is the sky\nblue?", "Yes…"), ("Is the sky\nblue?", "No")])
    assert b"\n" not in body
    assert "Is the sky\nblue?" in json.loads(body).values()
    assert ["Yes…", "No"] in json.loads(body).values()


def test_infinity_is_asked_for_the_scores_that_ours_gives() -> None:
    """Without `raw_scores` it answers with a sigmoid of them."""
    body = INFINITY.body([("Is the sky blue?", "Yes"), ("Is the sky blue?", "No")])
    asked = {"model": INFINITY_MODEL, "query": "Is the sky blue?", "documents": ["Yes", "No"], "raw_scores": True}
    assert json.loads(body) == asked


# Counting


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_a_value_that_was_measured_and_lies_beside_numpys(seconds: list[float], share: float) -> None:
    found = quantile(seconds, share)
    ordered = sorted(seconds)
    assert found in seconds
    assert sum(value <= found for value in seconds) >= share * len(seconds) - 1e-6
    below = max(0, ordered.index(found) - 1)
    above = min(len(ordered) - 1, len(ordered) - 1 - ordered[::-1].index(found) + 1)
    assert ordered[below] <= np.percentile(seconds, share * 100) + 1e-9
    assert np.percentile(seconds, share * 100) <= ordered[above] + 1e-9


def test_latencies_are_milliseconds_and_nothing_has_none() -> None:
    found = latencies([place / 1000 for place in range(1, 201)])
    assert found == {"count": 200, "p50": 100.0, "p90": 180.0, "p99": 198.0, "max": 200.0}
    assert latencies([]) == {"count": 0, "p50": None, "p90": None, "p99": None, "max": None}


def an_exchange(
    place: int = 0, *, seconds: float = 0.1, status: int = 200, body: bytes = b"", problem: str = ""
) -> Exchange:
    return Exchange(place, 10.0, 10.001, 10.0 + seconds, status, body, problem)


def test_requests_are_counted_by_what_became_of_them_each_with_its_own_latency() -> None:
    found = count_outcomes(
        [
            an_exchange(0, seconds=0.1),
            an_exchange(1, seconds=0.3),
            an_exchange(0, seconds=0.004, status=429),
            an_exchange(0, seconds=0.002, status=503),
            an_exchange(1, seconds=0.002, status=0, problem="connection closed"),
            an_exchange(1, seconds=30.0, status=0, problem=HUNG),
        ],
        sizes=[1, 16],
    )
    assert (found["requests"], found["failed"], found["hung"]) == (6, 2, 1)
    assert (found["accepted"]["count"], found["accepted"]["max"]) == (2, 300.0)
    assert (found["refused"]["count"], found["refused"]["max"]) == (1, 4.0)
    assert found["problems"] == {"status 503": 1, "connection closed": 1}
    assert {size: (row["sent"], row["max"]) for size, row in found["accepted_by_pairs"].items()} == {
        "1": (3, 100.0),
        "16": (3, 300.0),
    }
    assert found["late_ms"]["max"] == 1.0


def test_another_score_is_counted_and_so_is_an_answer_without_all_scores() -> None:
    expected = [np.array([0.5, 0.25]), np.array([0.125])]

    def answer(place: int, *scores: object) -> Exchange:
        rows = [{"index": index, "score": score} for index, score in enumerate(scores)]
        return an_exchange(place, body=json.dumps({"results": rows}).encode())

    right = [answer(0, 0.5, 0.25), answer(1, 0.125), an_exchange(0, status=429, body=b"busy")]
    assert compare_scores(right, expected, NATIVE.scores) == {
        "compared": 2, "different": 0, "unreadable": 0, "max_difference": 0.0,
    }  # fmt: skip
    wrong = [answer(0, 0.5, 0.25 + 2**-50), answer(0, 0.25, 0.5), answer(0, 0.5), answer(1, None), an_exchange(1)]
    found = compare_scores([*right, *wrong, answer(1, float("nan"))], expected, NATIVE.scores)
    assert found == {"compared": 8, "different": 2, "unreadable": 4, "max_difference": 0.25}
