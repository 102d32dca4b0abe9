"""Read our own requests, and write their answers. Knows nothing of HTTP."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cappy_engine.pairs import candidate_pairs
from cappy_engine.serving.dialects.reading import decoded, ranked_places
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, ServedModel

Truncation = Annotated[
    Literal["truncate", "refuse"],
    Meta(description="What happens to a pair with more tokens than the model takes."),
]


class TextPair(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    """A pair of texts, both taken as they are."""

    instruction: Annotated[str, Meta(description="What was asked.", examples=["Is the sky blue?"])]
    response: Annotated[str, Meta(description="What was answered.", examples=["Yes"])]


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Pairs to score."""

    pairs: Annotated[list[TextPair], Meta(min_length=1, description="The pairs, each scored by itself.")]
    too_long: Truncation = "truncate"


class RankRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Candidates to rank: responses of one instruction."""

    instruction: Annotated[str, Meta(description="What was asked.", examples=["Is the sky blue?"])]
    candidates: Annotated[list[str], Meta(min_length=1, description="The responses.", examples=[["Yes", "No"]])]
    top_n: Annotated[int, Meta(ge=1, description="How many of the best are listed; null: all.")] | None = None
    exact_winner: Annotated[
        bool, Meta(description="Score again in fp32 the candidates between which int8's error could decide.")
    ] = False
    too_long: Truncation = "truncate"


class PairScore(msgspec.Struct, frozen=True):
    """The score of a pair."""

    score: Annotated[float, Meta(description="The model's raw score, not a probability.")]
    tokens: Annotated[int, Meta(ge=0, description="Tokens of the pair that the model read.")]
    is_truncated: Annotated[bool, Meta(description="Whether the pair was cut to the length that the model takes.")]


class ScoreAnswer(msgspec.Struct, frozen=True):
    """The scores of pairs, in their order."""

    model: str
    device: str
    precision: str
    results: list[PairScore]
    tokens: Annotated[int, Meta(ge=0, description="Tokens of all pairs.")]
    truncated: Annotated[int, Meta(ge=0, description="How many pairs were cut.")]


class RankedCandidate(msgspec.Struct, frozen=True):
    """A candidate and its score."""

    index: Annotated[int, Meta(ge=0, description="Its place in the list that was sent.")]
    response: str
    score: Annotated[float, Meta(description="The model's raw score, not a probability.")]
    tokens: Annotated[int, Meta(ge=0)]
    is_truncated: bool
    is_exact: Annotated[bool, Meta(description="Whether it was scored again in fp32, and `score` is that score.")]


class RankAnswer(msgspec.Struct, frozen=True):
    """The candidates, the best first; the first wins a tie."""

    model: str
    device: str
    precision: str
    results: list[RankedCandidate]
    tokens: Annotated[int, Meta(ge=0, description="Tokens of all candidates, also of those that top_n leaves out.")]
    truncated: Annotated[int, Meta(ge=0, description="How many of all candidates were cut.")]


def read_score(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read pairs to score. Raises InvalidRequest.

    >>> read_score(b'{"pairs": [{"instruction": "Is the sky blue?", "response": "Yes"}]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    asked = decoded(body, ScoreRequest)
    pairs = [(pair.instruction, pair.response) for pair in asked.pairs]
    return ScoringRequest(pairs, _answer_scores, asked.too_long)


def read_rank(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read candidates to rank. Raises InvalidRequest.

    >>> read_rank(b'{"instruction": "Is the sky blue?", "candidates": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    asked = decoded(body, RankRequest)
    pairs = candidate_pairs(asked.instruction, asked.candidates)
    return ScoringRequest(pairs, partial(_answer_ranks, asked), asked.too_long, asked.exact_winner)


def _answer_scores(result: ScoringResult) -> ScoreAnswer:
    found = result.scored
    scores, counts, truncated = found.scores.tolist(), found.token_counts.tolist(), found.truncated.tolist()
    return ScoreAnswer(
        model=result.model.name,
        device=result.model.device,
        precision=result.model.precision,
        results=[
            PairScore(score=score, tokens=tokens, is_truncated=is_truncated)
            for score, tokens, is_truncated in zip(scores, counts, truncated, strict=True)
        ],
        tokens=result.tokens,
        truncated=result.truncated,
    )


def _answer_ranks(asked: RankRequest, result: ScoringResult) -> RankAnswer:
    found = result.scored
    return RankAnswer(
        model=result.model.name,
        device=result.model.device,
        precision=result.model.precision,
        results=[
            RankedCandidate(
                index=place,
                response=asked.candidates[place],
                score=float(result.exact.get(place, found.scores[place])),
                tokens=int(found.token_counts[place]),
                is_truncated=bool(found.truncated[place]),
                is_exact=place in result.exact,
            )
            for place in ranked_places(result, asked.top_n)
        ],
        tokens=result.tokens,
        truncated=result.truncated,
    )
