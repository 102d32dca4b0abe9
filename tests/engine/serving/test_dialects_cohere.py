"""Rerank requests of Cohere, Jina, vLLM and infinity. Bodies are those that they publish."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cappy_engine.serving.dialects import cohere
from cappy_engine.serving.dialects.routes import read_rerank
from tests.support.dialects import LONG, Read, best_first, paired, refusal, reply_to, request_of, scores_of

CAPITAL = "What is the capital of the United States?"
CITIES = [
    "Carson City is the capital city of the American state of Nevada.",
    "The Commonwealth of the Northern Mariana Islands is a group of islands in the Pacific. Its capital is Saipan.",
    "Washington, D.C. is the capital of the United States.",
    "Capital punishment has existed in the United States since before it was a country.",
]
COHERE = {"model": "cappy-mini", "query": CAPITAL, "documents": CITIES, "top_n": 3}
JINA = {
    "model": "rerank",
    "query": "Organic skincare products for sensitive skin",
    "top_n": 2,
    "documents": ["Organic skincare with aloe vera", "New makeup trends", "Bio-Hautpflege für empfindliche Haut"],
}
VLLM = {
    "model": "cappy-mini",
    "query": "What is the capital of France?",
    "documents": [
        "The capital of Brazil is Brasilia.",
        "The capital of France is Paris.",
        "Horses and cows are animals",
    ],
}
VLLM_BENCH = VLLM | {"truncate_prompt_tokens": -1}
"""What `vllm bench serve --backend vllm-rerank` sends."""
READERS: dict[str, Read] = {"/v1/rerank": cohere.read_v1, "/v2/rerank": cohere.read_v2, "/rerank": read_rerank}

each_path = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def ranks(answer: Any) -> list[tuple[int, float]]:
    return [(each["index"], each["relevance_score"]) for each in answer["results"]]


@each_path
@pytest.mark.parametrize("body", [COHERE, JINA, VLLM, VLLM_BENCH], ids=["cohere", "jina", "vllm", "vllm-bench"])
def test_published_requests_are_answered_best_first_with_raw_scores(read: Read, body: dict[str, Any]) -> None:
    scores = scores_of(paired(body["query"], body["documents"]))
    found = reply_to(read, body)
    assert ranks(found) == [(place, scores[place]) for place in best_first(scores)][: body.get("top_n")]
    assert found["model"] == "cappy-mini"


@each_path
def test_an_answer_has_what_each_client_looks_for(read: Read) -> None:
    found = reply_to(read, COHERE)
    tokens = found["usage"]["total_tokens"]
    assert tokens > 0
    assert found["id"] == "rerank-a1b2"
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert found["meta"] == {
        "api_version": {"version": "2" if read is cohere.read_v2 else "1"},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }


def test_documents_come_back_where_a_dialect_does_so_and_where_asked_for() -> None:
    def shown(read: Read, asked: bool | None) -> list[Any]:
        return [each.get("document") for each in reply_to(read, VLLM | {"return_documents": asked})["results"]]

    (_, *others) = READERS.values()
    texts = [{"text": VLLM["documents"][place]} for place, _ in ranks(reply_to(others[0], VLLM))]
    for read in READERS.values():
        assert shown(read, True) == texts
        assert shown(read, False) == [None] * 3
        assert shown(read, None) == (texts if read is read_rerank else [None] * 3)


@each_path
def test_documents_may_be_objects_whose_other_fields_come_back(read: Read) -> None:
    documents = [{"text": "Paris", "title": "France"}, "Berlin", {"text": "Rome"}]
    found = reply_to(
        read, {"query": CAPITAL, "documents": documents, "return_documents": True, "rank_fields": ["text"]}
    )
    scores = scores_of(paired(CAPITAL, ["Paris", "Berlin", "Rome"]))
    assert dict(ranks(found)) == dict(enumerate(scores))
    assert {each["index"]: each["document"] for each in found["results"]} == {
        0: documents[0],
        1: {"text": "Berlin"},
        2: documents[2],
    }


@each_path
def test_one_text_is_one_document(read: Read) -> None:
    assert request_of(read, {"query": "a", "documents": "b"}).pairs == [("a", "b")]


@each_path
def test_the_same_document_twice_is_two_results_and_the_first_comes_first(read: Read) -> None:
    found = reply_to(read, {"query": "a", "documents": ["b", "c", "b"]}, scores=[0.5, 0.1, 0.5])
    assert [place for place, _ in ranks(found)] == [0, 2, 1]


@each_path
def test_pairs_that_were_cut_are_warned_of(read: Read) -> None:
    found = reply_to(read, {"query": CAPITAL, "documents": ["Paris", LONG]})
    assert found["meta"]["warnings"] == ["1 of 2 pairs were truncated, the first is pair 1"]


@each_path
@pytest.mark.parametrize("asked", [{"raw_scores": False}, {"use_activation": True}, {"activation": True}])
def test_an_explicit_wish_gives_the_sigmoid_and_the_same_order(read: Read, asked: dict[str, bool]) -> None:
    raw, found = ranks(reply_to(read, VLLM)), ranks(reply_to(read, VLLM | asked))
    assert [place for place, _ in found] == [place for place, _ in raw]
    assert [score for _, score in found] == [pytest.approx(1 / (1 + math.exp(-score))) for _, score in raw]


@each_path
@pytest.mark.parametrize(
    "harmless",
    [
        {"model": None},
        {"model": ""},
        {"top_n": None},
        {"top_n": 99},
        {"rank_fields": ["text"]},
        {"max_chunks_per_doc": 1},
        {"max_tokens_per_doc": 4096},
        {"max_tokens_per_doc": 512},
        {"max_tokens_per_doc": 0, "max_tokens_per_query": 0},
        {"truncate_prompt_tokens": 512},
        {"truncation_side": "right"},
        {"priority": 3, "user": "me", "padding": "max_length", "cache_salt": "x", "encoding_format": "float"},
        {"softmax": False, "use_activation": False, "activation": False, "raw_scores": True},
        {"instruction": "", "chat_template_kwargs": {}, "mm_processor_kwargs": {}},
        {"return_documents": None, "raw_scores": None},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_taken(read: Read, harmless: dict[str, Any]) -> None:
    assert ranks(reply_to(read, VLLM | harmless)) == ranks(reply_to(read, VLLM))
    assert request_of(read, VLLM | harmless).too_long == "truncate"


@each_path
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_fields", ["title"]),
        ("rank_fields", ["title", "text"]),
        ("rank_fields", []),
        ("max_chunks_per_doc", 10),
        ("max_chunks_per_doc", 0),
        ("max_tokens_per_doc", 511),
        ("max_tokens_per_query", 64),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", 100),
        ("truncate_prompt_tokens", 513),
        ("truncation_side", "left"),
        ("softmax", True),
        ("instruction", "Find what answers the query"),
        ("chat_template_kwargs", {"instruction": "a"}),
        ("mm_processor_kwargs", {"a": 1}),
    ],
)
def test_what_cannot_be_honoured_is_refused_not_ignored(read: Read, field: str, value: object) -> None:
    why = refusal(read, VLLM | {field: value})
    assert why.startswith(f"{field} ")
    assert "is not supported: " in why
    assert "; leave it out" in why


@each_path
@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"documents": []}, "$.documents: expected `array` of length >= 1"),
        ({"documents": [3]}, "$.documents[0]: expected `str | object`, got `int`"),
        ({"documents": ["a", {"title": "b"}]}, "$.documents[1]: object missing required field `text`"),
        ({"documents": [{"text": 3}]}, "$.documents[0][...]: expected `str`, got `int`"),
        (
            {"documents": [{"content": [{"type": "text"}]}]},
            "$.documents[0][...]: expected `str`, got `array`",
        ),
        ({"top_n": 0}, "$.top_n: expected `int` >= 1"),
        ({"top_n": -1}, "$.top_n: expected `int` >= 1"),
        ({"top_n": 2.5}, "$.top_n: expected `int | null`, got `float`"),
        ({"query": None}, "$.query: expected `str`, got `null`"),
        ({"raw_scores": True, "use_activation": True}, "raw_scores and use_activation ask for different scores"),
    ],
    ids=str,
)
def test_what_has_another_shape_is_refused(read: Read, asked: dict[str, Any], why: str) -> None:
    assert refusal(read, VLLM | asked).startswith(why)


@each_path
def test_another_models_name_is_not_found(read: Read) -> None:
    why = refusal(read, VLLM | {"model": "rerank-v3.5"}, 404)
    assert why.startswith("model 'rerank-v3.5' is not served here, only cappy-mini, rerank;")


@each_path
def test_a_request_may_name_itself(read: Read) -> None:
    assert reply_to(read, VLLM | {"request_id": "mine"})["id"] == "rerank-mine"
