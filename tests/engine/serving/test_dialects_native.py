"""Our own requests, and what holds for the bodies of every dialect."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from cappy_engine.errors import InvalidRequest
from cappy_engine.scored import Scored
from cappy_engine.serving.dialects import cohere, native
from cappy_engine.serving.dialects.examples import EXAMPLES
from cappy_engine.serving.dialects.reading import wants_sigmoid
from cappy_engine.serving.dialects.routes import ROUTES, Route, read_score
from cappy_engine.serving.requests import ScoringResult
from tests.support.dialects import LONG, MODEL, Read, best_first, paired, refusal, reply_to, request_of, scores_of

SKY = "Is the sky blue?"
ANSWERS = ["It depends on the weather, and on the time of the day", "No", "Yes"]


def test_pairs_are_scored_in_their_order() -> None:
    pairs = [(SKY, "Yes"), ("Is grass red?", "No"), ("", "")]
    body = {"pairs": [{"instruction": instruction, "response": response} for instruction, response in pairs]}
    found = reply_to(native.read_score, body)
    assert [each["score"] for each in found["results"]] == scores_of(pairs)
    assert found["tokens"] == sum(each["tokens"] for each in found["results"]) > 0
    assert {name: found[name] for name in ("model", "device", "precision", "truncated")} == {
        "model": "cappy-mini",
        "device": "cpu",
        "precision": "int8",
        "truncated": 0,
    }


def test_a_pair_that_was_cut_says_so() -> None:
    body = {"pairs": [{"instruction": SKY, "response": LONG}, {"instruction": SKY, "response": "Yes"}]}
    found = reply_to(native.read_score, body)
    assert [(each["tokens"], each["is_truncated"]) for each in found["results"]] == [(512, True), (10, False)]
    assert (found["tokens"], found["truncated"]) == (522, 1)
    assert request_of(native.read_score, body | {"too_long": "refuse"}).too_long == "refuse"


def test_candidates_come_back_best_first() -> None:
    found = reply_to(native.read_rank, {"instruction": SKY, "candidates": ANSWERS})
    scores = scores_of(paired(SKY, ANSWERS))
    order = best_first(scores)
    assert order != sorted(order)
    assert [(each["index"], each["response"], each["score"]) for each in found["results"]] == [
        (place, ANSWERS[place], scores[place]) for place in order
    ]


@pytest.mark.parametrize(("top_n", "count"), [(None, 3), (1, 1), (3, 3), (50, 3)])
def test_the_best_are_listed_and_all_are_counted(top_n: int | None, count: int) -> None:
    everything = reply_to(native.read_rank, {"instruction": SKY, "candidates": ANSWERS})
    found = reply_to(native.read_rank, {"instruction": SKY, "candidates": ANSWERS, "top_n": top_n})
    assert found["results"] == everything["results"][:count]
    assert found["tokens"] == everything["tokens"]


def test_the_first_of_equals_comes_first() -> None:
    found = reply_to(native.read_rank, {"instruction": SKY, "candidates": ["a", "b", "a"]}, scores=[0.5, 0.9, 0.9])
    assert [each["index"] for each in found["results"]] == [1, 2, 0]


def test_exact_scores_are_told() -> None:
    asked = request_of(native.read_rank, {"instruction": SKY, "candidates": ANSWERS, "exact_winner": True})
    assert asked.exact_winner
    scored = Scored(np.array([0.5, 0.51, 0.1], np.float32), np.array([5, 6, 7]), np.zeros(3, np.bool_))
    answer = asked.answer(ScoringResult(scored, MODEL, "a1b2", 0, exact={0: 0.55, 1: 0.49}))
    found = msgspec.json.decode(msgspec.json.encode(answer))["results"]
    assert [(each["index"], each["score"], each["is_exact"]) for each in found] == [
        (0, 0.55, True),
        (1, 0.49, True),
        (2, pytest.approx(0.1), False),
    ]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "the body: object missing required field `pairs`"),
        ([], "the body: expected `object`, got `array`"),
        ({"pairs": []}, "$.pairs: expected `array` of length >= 1"),
        ({"pairs": [["a", "b"]]}, "$.pairs[0]: expected `object`, got `array`"),
        ({"pairs": [{"instruction": "a"}]}, "$.pairs[0]: object missing required field `response`"),
        (
            {"pairs": [{"instruction": "a", "response": "b"}, {"instruction": "a", "response": 3}]},
            "$.pairs[1].response: expected `str`, got `int`",
        ),
        (
            {"pairs": [{"instruction": "a", "response": "b", "id": 1}]},
            "$.pairs[0]: object contains unknown field `id`; it may have instruction, response",
        ),
        (
            {"pairs": [{"instruction": "a", "response": "b"}], "too_long": "cut"},
            "$.too_long: invalid enum value 'cut'; it may be refuse, truncate",
        ),
        (
            {"pairs": [{"instruction": "a", "response": "b"}], "too_long": "contains unknown field"},
            "$.too_long: invalid enum value 'contains unknown field'; it may be refuse, truncate",
        ),
    ],
)
def test_what_has_another_shape_is_refused_with_its_place(body: object, why: str) -> None:
    assert refusal(native.read_score, body) == why


@pytest.mark.parametrize("top_n", [0, -1, 1.5, "1", True])
def test_a_count_that_is_none_is_refused(top_n: object) -> None:
    body = {"instruction": SKY, "candidates": ANSWERS, "top_n": top_n}
    assert refusal(native.read_rank, body).startswith("$.top_n: expected ")


# Of every dialect


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not JSON",
        b'{"query": NaN}',
        b'{"query": "a"} {}',
        b'{"pairs": "\xff", "query": "\xff", "inputs": "\xff", "text_1": "\xff", "instruction": "\xff", "id": "\xff"}',
        b'{"pairs": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b'{"pairs": ' + b"[" * 100_000,
        b'{"query": "a", "texts": ' + b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"parameters": ' + b'{"a":' * 100_000,
    ],
    ids=lambda body: str(body[:20]),
)
def test_what_is_not_json_is_refused_and_never_a_crash(route: Route, body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request_of(route.read, body)
    assert caught.value.status in (400, 422)
    assert str(caught.value)


def test_nesting_that_no_parser_takes_is_not_json() -> None:
    body = b'{"pairs": [{"instruction": "a", "response": "b"}], "more": ' + b"[" * 100_000
    assert refusal(read_score, body, 400) == "the body is not JSON: its lists or objects are nested too deeply"


def test_bytes_that_are_not_utf8_are_not_json() -> None:
    problem = refusal(native.read_score, b'{"pairs": [{"instruction": "\xff"}]}', 400)
    assert problem == "the body is not UTF-8: byte 0xff at offset 28; send JSON in UTF-8"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_the_example_of_every_request_is_answered(route: Route) -> None:
    for shape in route.requests:
        found = reply_to(route.read, EXAMPLES[shape])
        assert any(_is(found, answer) for answer in route.answers)


def _is(found: object, answer: Any) -> bool:
    try:
        msgspec.convert(found, answer)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_unknown_fields_are_refused(route: Route) -> None:
    for shape in route.requests:
        body = EXAMPLES[shape]
        assert isinstance(body, dict)
        assert "unknown field `instructions`" in refusal(route.read, body | {"instructions": "a"})


@pytest.mark.parametrize(
    "name", ["a" * 20_000, " - at `$" + "[" * 20_000, "` - at `$.a" * 2_000], ids=lambda name: name[:9]
)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_of_what_a_client_made_up_little_comes_back(route: Route, name: str) -> None:
    """It is not searched for long, either: whoever reads a body keeps all others waiting."""
    for shape in route.requests:
        body = EXAMPLES[shape]
        assert isinstance(body, dict)
        assert len(refusal(route.read, body | {name: "a"})) < 1000


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.operation)
def test_a_field_that_is_there_twice_is_refused(route: Route) -> None:
    for shape in route.requests:
        example = EXAMPLES[shape]
        assert isinstance(example, dict)
        for name, value in example.items():
            again = msgspec.json.encode({name: value})[1:]
            body = msgspec.json.encode(example)[:-1] + b"," + again
            assert refusal(route.read, body) == f"the body: has the field {name!r} twice; send it once"


@pytest.mark.parametrize(
    ("read", "body", "name"),
    [
        (native.read_score, rb'{"pairs":[{"instruction":"a","response":"b","response":"c"}]}', "response"),
        (native.read_rank, rb'{"instruction":"a","candidates":["b"],"c\u0061ndidates":["c"]}', "candidates"),
        (cohere.read_v2, rb'{"query":"a","documents":["b",{"text":"c","\u0074ext":"d"}]}', "text"),
        (cohere.read_v2, rb'{"query":"a","documents":[{"text":"c","id\u00e9":"d","id\u00E9":"e"}]}', "idé"),
    ],
    ids=["list", "escaped", "document", "of any name"],
)
def test_a_field_is_found_twice_in_any_object_and_however_it_is_written(read: Read, body: bytes, name: str) -> None:
    assert refusal(read, body) == f"the body: has the field {name!r} twice; send it once"


def test_what_looks_like_a_field_in_a_text_is_none() -> None:
    text = '{"response": 1, "response": 2}'
    body = {"pairs": [{"instruction": text, "response": "response"}] * 2}
    assert request_of(native.read_score, body).pairs == [(text, "response")] * 2


def test_one_path_takes_our_requests_and_those_of_vllm() -> None:
    assert request_of(read_score, {"text_1": SKY, "text_2": "Yes"}).pairs == [(SKY, "Yes")]
    assert request_of(read_score, EXAMPLES[native.ScoreRequest]).pairs[0] == (SKY, "Yes")
    assert "needs `pairs`, or vLLM's" in refusal(read_score, {"pair": [SKY, "Yes"]})
    assert "unknown field `text_1`" in refusal(
        read_score, {"pairs": [{"instruction": "a", "response": "b"}], "text_1": "a"}
    )


def test_what_a_request_wants_is_told_once() -> None:
    assert not wants_sigmoid(raw_scores=None, use_activation=None)
    assert wants_sigmoid(raw_scores=False, use_activation=True)
    with pytest.raises(InvalidRequest, match="raw_scores and use_activation ask for different scores"):
        wants_sigmoid(raw_scores=True, use_activation=True)
