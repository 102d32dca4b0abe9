"""Requests of text-embeddings-inference. Bodies are those of its README and its types, where it has some."""

from __future__ import annotations

import math

import pytest

from cappy_engine.serving.dialects import tei
from cappy_engine.serving.dialects.routes import read_rerank
from tests.support.dialects import LONG, best_first, paired, refusal, reply_to, request_of, scores_of

DEEP = "What is Deep Learning?"
TEXTS = ["Deep Learning is not...", "Deep learning is..."]
PUBLISHED = {"query": DEEP, "texts": TEXTS}


def test_texts_come_back_best_first_with_raw_scores() -> None:
    scores = scores_of(paired(DEEP, TEXTS))
    assert reply_to(read_rerank, PUBLISHED) == [
        {"index": place, "score": scores[place]} for place in best_first(scores)
    ]
    assert reply_to(read_rerank, PUBLISHED | {"raw_scores": True}) == reply_to(read_rerank, PUBLISHED)


def test_an_explicit_false_gives_the_sigmoid_and_the_same_order() -> None:
    raw = reply_to(read_rerank, PUBLISHED)
    found = reply_to(read_rerank, PUBLISHED | {"raw_scores": False})
    assert [each["index"] for each in found] == [each["index"] for each in raw]
    assert [each["score"] for each in found] == [pytest.approx(1 / (1 + math.exp(-each["score"]))) for each in raw]


def test_scores_whose_sigmoids_are_equal_keep_their_order() -> None:
    found = reply_to(read_rerank, PUBLISHED | {"raw_scores": False}, scores=[100.0, 200.0])
    assert found == [{"index": 1, "score": 1.0}, {"index": 0, "score": 1.0}]


def test_texts_come_back_if_asked_for() -> None:
    found = reply_to(read_rerank, PUBLISHED | {"return_text": True, "truncate": True})
    assert [each["text"] for each in found] == [TEXTS[each["index"]] for each in found]


@pytest.mark.parametrize(("truncate", "too_long"), [(None, "truncate"), (True, "truncate"), (False, "refuse")])
@pytest.mark.parametrize("direction", ["Right", "right"])
def test_only_an_explicit_false_refuses_what_is_too_long(truncate: bool | None, too_long: str, direction: str) -> None:
    asked = {"truncate": truncate, "truncation_direction": direction}
    assert request_of(read_rerank, PUBLISHED | asked).too_long == too_long
    assert request_of(tei.read_predict, {"inputs": [DEEP, LONG]} | asked).too_long == too_long


@pytest.mark.parametrize("direction", ["Left", "left"])
def test_the_left_is_cut_nowhere(direction: str) -> None:
    assert "is not supported" in refusal(read_rerank, PUBLISHED | {"truncation_direction": direction})
    assert "is not supported" in refusal(tei.read_predict, {"inputs": ["a", "b"], "truncation_direction": direction})
    harmless = PUBLISHED | {"truncation_direction": direction, "truncate": False}
    assert request_of(read_rerank, harmless).too_long == "refuse"


def test_more_texts_than_its_own_limit_are_fine() -> None:
    found = reply_to(read_rerank, {"query": DEEP, "texts": ["same"] * 33})
    assert [each["index"] for each in found] == list(range(33))
    assert len({each["score"] for each in found}) == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"query": DEEP, "texts": []}, "$.texts: expected `array` of length >= 1"),
        ({"query": DEEP, "texts": "a"}, "$.texts: expected `array`, got `str`"),
        ({"query": DEEP, "texts": ["a", None]}, "$.texts[1]: expected `str`, got `null`"),
        ({"texts": ["a"]}, "the body: object missing required field `query`"),
        ({"query": DEEP}, "the body: needs `texts` (text-embeddings-inference) or `documents` (Cohere, Jina, vLLM)"),
        (
            {"query": DEEP, "texts": ["a"], "documents": ["b"]},
            "the body: object contains unknown field `documents`; it may have query, texts, truncate, "
            "truncation_direction, raw_scores, return_text",
        ),
    ],
)
def test_what_has_another_shape_is_refused(body: object, why: str) -> None:
    assert refusal(read_rerank, body) == why


# /predict


def test_two_texts_are_one_pair() -> None:
    found = reply_to(tei.read_predict, {"inputs": ["Is the sky blue?", "Yes"]})
    assert found == [{"score": scores_of([("Is the sky blue?", "Yes")])[0], "label": "LABEL_0"}]


def test_a_list_of_pairs_is_a_batch_even_of_one() -> None:
    pairs = [("a", "b"), ("c", "d"), ("a", "b")]
    found = reply_to(tei.read_predict, {"inputs": [list(pair) for pair in pairs]})
    assert found == [[{"score": score, "label": "LABEL_0"}] for score in scores_of(pairs)]
    assert reply_to(tei.read_predict, {"inputs": [["a", "b"]]}) == found[:1]


def test_a_prediction_may_be_a_sigmoid() -> None:
    (found,) = reply_to(tei.read_predict, {"inputs": ["a", "b"], "raw_scores": False}, scores=[0.0])
    assert found["score"] == 0.5


@pytest.mark.parametrize("inputs", ["I like you.", ["I like you."]])
def test_one_text_is_not_a_pair(inputs: object) -> None:
    assert refusal(tei.read_predict, {"inputs": inputs}) == (
        "$.inputs: one text is not a pair; send [instruction, response], or a batch [[instruction, response], ...]"
    )


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        (
            [["I like you."], ["I hate pineapples"]],
            "$.inputs[0]: expected a pair [instruction, response], got one text",
        ),
        ([["a", "b"], ["c"]], "$.inputs[1]: expected a pair [instruction, response], got one text"),
        ([["a", "b"], "c"], "$.inputs[1]: expected a pair [instruction, response], got one text"),
        (["a", ["b", "c"]], "$.inputs[0]: expected a pair [instruction, response], got one text"),
        ([["a", "b", "c"]], "$.inputs[0]: expected a pair [instruction, response], got 3 texts"),
        ([[]], "$.inputs[0]: expected a pair [instruction, response], got 0 texts"),
        (["a", "b", "c"], "$.inputs: a pair has two texts, not 3; a batch of pairs is [[instruction, response], ...]"),
        ([], "$.inputs: there is no pair; send [instruction, response], or a batch of such pairs"),
        ([["a", 1]], "$.inputs[0][1]: expected `str`, got `int`"),
    ],
)
def test_what_is_not_pairs_is_refused(inputs: object, why: str) -> None:
    assert refusal(tei.read_predict, {"inputs": inputs}) == why
