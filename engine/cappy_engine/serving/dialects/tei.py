"""Read text-embeddings-inference's /rerank and /predict, and write their answers. Knows nothing of HTTP.

Its published types are in its `router/src/http/types.rs`. What differs here: scores are raw unless `raw_scores` is
false (the models that it serves end in a sigmoid, Cappy does not), and what it would ignore is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import Pair, candidate_pairs
from cappy_engine.serving.dialects.reading import (
    decoded,
    ranked_places,
    refuse_others,
    scores_of,
    too_long_of,
    wants_sigmoid,
)
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, ServedModel

LABEL = "LABEL_0"
"""What transformers calls the only output of a model that was given no labels."""

Truncate = Annotated[
    bool | None, Meta(description="Whether a pair that is too long is cut; false: it is refused. null: it is cut.")
]
Direction = Annotated[
    Literal["Right", "right", "Left", "left"],
    Meta(description="Texts are cut at their ends (right). Left is refused where a text could be cut."),
]
RawScores = Annotated[
    bool | None, Meta(description="false: the sigmoid of each score; the order stays. Otherwise the raw scores.")
]


class TeiRerankRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Texts to rank for a query."""

    query: Annotated[str, Meta(description="The instruction.", examples=["What is Deep Learning?"])]
    texts: Annotated[list[str], Meta(min_length=1, description="The responses.", examples=[["Deep Learning is ..."]])]
    truncate: Truncate = None
    truncation_direction: Direction = "Right"
    raw_scores: RawScores = None
    return_text: Annotated[bool, Meta(description="Whether the answer holds the texts.")] = False


class TeiPredictRequest(msgspec.Struct, forbid_unknown_fields=True):
    """One pair, [instruction, response], or a list of pairs."""

    inputs: Annotated[
        str | list[str | list[str]],
        Meta(
            description="A pair [instruction, response], or a batch of pairs.", examples=[["Is the sky blue?", "Yes"]]
        ),
    ]
    truncate: Truncate = None
    truncation_direction: Direction = "Right"
    raw_scores: RawScores = None


class TeiRank(msgspec.Struct, frozen=True):
    """A text and its score."""

    index: Annotated[int, Meta(ge=0, description="Its place in the list that was sent.")]
    score: float
    text: str | UnsetType = UNSET


class TeiPrediction(msgspec.Struct, frozen=True):
    """The score of a pair. Cappy has one output, so that there is one label."""

    score: float
    label: str


def read_rerank(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read texts to rank. Raises InvalidRequest.

    >>> read_rerank(b'{"query": "Is the sky blue?", "texts": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    asked = decoded(body, TeiRerankRequest)
    _check_direction(asked.truncation_direction, asked.truncate)
    pairs = candidate_pairs(asked.query, asked.texts)
    return ScoringRequest(pairs, partial(_answer_ranks, asked), too_long_of(asked.truncate))


def read_predict(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read one pair, or a batch of pairs. Raises InvalidRequest.

    >>> read_predict(b'{"inputs": ["Is the sky blue?", "Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    asked = decoded(body, TeiPredictRequest)
    _check_direction(asked.truncation_direction, asked.truncate)
    is_one, pairs = _pairs(asked.inputs)
    is_sigmoid = wants_sigmoid(raw_scores=asked.raw_scores)
    return ScoringRequest(pairs, partial(_answer_predictions, is_one, is_sigmoid), too_long_of(asked.truncate))


def _check_direction(direction: str, truncate: bool | None) -> None:
    if truncate is not False:
        refuse_others(
            "truncation_direction", direction, ("Right", "right"), "Cappy's texts are cut at their ends, as in training"
        )


def _pairs(inputs: str | list[str | list[str]]) -> tuple[bool, list[Pair]]:
    """Return the pairs, and whether one was sent alone. Two texts are ONE pair, as in text-embeddings-inference."""
    if isinstance(inputs, str) or (len(inputs) == 1 and isinstance(inputs[0], str)):
        raise InvalidRequest(
            "$.inputs: one text is not a pair; send [instruction, response], or a batch [[instruction, response], ...]"
        )
    if not inputs:
        raise InvalidRequest("$.inputs: there is no pair; send [instruction, response], or a batch of such pairs")
    texts = [each for each in inputs if isinstance(each, str)]
    if len(texts) == len(inputs) == 2:
        return True, [(texts[0], texts[1])]
    if len(texts) == len(inputs):
        raise InvalidRequest(
            f"$.inputs: a pair has two texts, not {len(texts)}; a batch of pairs is [[instruction, response], ...]"
        )
    pairs: list[Pair] = []
    for place, each in enumerate(inputs):
        if isinstance(each, str) or len(each) != 2:
            found = "one text" if isinstance(each, str) or len(each) == 1 else f"{len(each)} texts"
            raise InvalidRequest(f"$.inputs[{place}]: expected a pair [instruction, response], got {found}")
        pairs.append((each[0], each[1]))
    return False, pairs


def _answer_ranks(asked: TeiRerankRequest, result: ScoringResult) -> list[TeiRank]:
    scores = scores_of(result, is_sigmoid=wants_sigmoid(raw_scores=asked.raw_scores))
    return [
        TeiRank(place, scores[place], asked.texts[place] if asked.return_text else UNSET)
        for place in ranked_places(result, None)
    ]


def _answer_predictions(
    is_one: bool, is_sigmoid: bool, result: ScoringResult
) -> list[TeiPrediction] | list[list[TeiPrediction]]:
    found = [[TeiPrediction(score, LABEL)] for score in scores_of(result, is_sigmoid=is_sigmoid)]
    return found[0] if is_one else found
