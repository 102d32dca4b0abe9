"""vLLM's /score. Bodies are those of its documentation, where it has some."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cappy_engine.serving.dialects import vllm
from cappy_engine.serving.dialects.routes import read_score
from tests.support.dialects import Read, refusal, reply_to, request_of, scores_of

FRANCE = "What is the capital of France?"
BRAZIL = "What is the capital of Brazil?"
TEXTS = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]
ONE = {"model": "cappy-mini", "encoding_format": "float", "text_1": FRANCE, "text_2": TEXTS[1]}
MANY = {"model": "cappy-mini", "text_1": FRANCE, "text_2": TEXTS}
PAIRED = {"model": "cappy-mini", "encoding_format": "float", "text_1": [BRAZIL, FRANCE], "text_2": TEXTS}
READERS: dict[str, Read] = {"/score": vllm.read_score, "/v1/score": read_score}

each_path = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@each_path
@pytest.mark.parametrize(
    ("body", "pairs"),
    [
        (ONE, [(FRANCE, TEXTS[1])]),
        (MANY, [(FRANCE, text) for text in TEXTS]),
        (PAIRED, [(BRAZIL, TEXTS[0]), (FRANCE, TEXTS[1])]),
        ({"text_1": [FRANCE], "text_2": TEXTS}, [(FRANCE, text) for text in TEXTS]),
        ({"queries": FRANCE, "documents": TEXTS}, [(FRANCE, text) for text in TEXTS]),
        ({"queries": [BRAZIL, FRANCE], "items": TEXTS}, [(BRAZIL, TEXTS[0]), (FRANCE, TEXTS[1])]),
        ({"data_1": FRANCE, "data_2": TEXTS[0]}, [(FRANCE, TEXTS[0])]),
    ],
    ids=["one", "many", "paired", "one of a list", "documents", "items", "data"],
)
def test_texts_are_paired_and_scored_in_their_order(read: Read, body: dict[str, Any], pairs: list[Any]) -> None:
    found = reply_to(read, body)
    tokens = found["usage"]["total_tokens"]
    assert tokens > 0
    assert found == {
        "id": "score-a1b2",
        "object": "list",
        "created": 1_700_000_000,
        "model": "cappy-mini",
        "data": [{"index": place, "object": "score", "score": score} for place, score in enumerate(scores_of(pairs))],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


@each_path
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            {"text_1": [FRANCE, BRAZIL], "text_2": ["a", "b", "c"]},
            "$.text_1: has 2 texts and text_2 has 3; send one text_1 for all, or as many as text_2 has",
        ),
        ({"queries": [FRANCE, BRAZIL], "documents": "a"}, "$.queries: has 2 texts and documents has 1;"),
        ({"text_1": FRANCE, "text_2": []}, "$.text_2: expected `array` of length >= 1"),
        ({"text_1": [], "text_2": TEXTS}, "$.text_1: expected `array` of length >= 1"),
        ({"text_1": FRANCE}, "the body: object missing required field `text_2`"),
        ({"documents": TEXTS}, "the body: object missing required field `queries`"),
        ({"text_1": FRANCE, "documents": TEXTS}, "the body: object"),
        ({"text_1": FRANCE, "text_2": TEXTS, "queries": FRANCE}, "the body: object contains unknown field `queries`"),
        ({"text_1": FRANCE, "text_2": [{"content": []}]}, "$.text_2[0]: expected `str`, got `object`"),
    ],
    ids=str,
)
def test_what_cannot_be_paired_is_refused(read: Read, body: dict[str, Any], why: str) -> None:
    assert refusal(read, body).startswith(why)


def test_what_names_no_texts_is_told_how_they_may_be_called() -> None:
    assert "`text_1` and `text_2`, or `queries` and `documents`" in refusal(vllm.read_score, {"queries": FRANCE})


@each_path
@pytest.mark.parametrize(("limit", "too_long"), [(None, "refuse"), (-1, "truncate"), (512, "truncate")])
def test_pairs_are_cut_only_where_that_is_asked_for(read: Read, limit: int | None, too_long: str) -> None:
    assert request_of(read, MANY | {"truncate_prompt_tokens": limit}).too_long == too_long
    assert request_of(read, MANY).too_long == "refuse"


@each_path
@pytest.mark.parametrize("limit", [0, 100, 511, 513, 8192])
def test_a_length_that_is_not_the_models_is_refused(read: Read, limit: int) -> None:
    assert refusal(read, MANY | {"truncate_prompt_tokens": limit}) == (
        f"truncate_prompt_tokens {limit} is not supported: a pair is cut where it has 512 tokens, and nowhere else; "
        "leave it out, or send -1 or 512"
    )


@each_path
@pytest.mark.parametrize("name", ["use_activation", "activation"])
def test_an_activation_is_a_sigmoid(read: Read, name: str) -> None:
    raw = [each["score"] for each in reply_to(read, MANY)["data"]]
    found = [each["score"] for each in reply_to(read, MANY | {name: True})["data"]]
    assert found == [pytest.approx(1 / (1 + math.exp(-score))) for score in raw]
    assert [each["score"] for each in reply_to(read, MANY | {name: False})["data"]] == raw


@each_path
def test_a_softmax_over_one_score_is_refused(read: Read) -> None:
    assert "a softmax over one score is always 1" in refusal(read, MANY | {"softmax": True})
    assert "ask for different scores" in refusal(read, MANY | {"use_activation": True, "activation": False})


@each_path
def test_another_models_name_is_not_found(read: Read) -> None:
    assert "is not served here" in refusal(read, MANY | {"model": "BAAI/bge-reranker-v2-m3"}, 404)
