"""Read vLLM's /score, and write its answers; the fields that its /rerank shares. Knows nothing of HTTP.

Its published types are in `vllm/entrypoints/pooling/scoring/protocol.py`. What differs here: scores are raw unless an
activation is asked for, and what cannot be honoured is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import Pair, TooLong
from cappy_engine.serving.dialects.reading import (
    decoded,
    field_names,
    refuse_others,
    scores_of,
    wants_sigmoid,
)
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, ServedModel

Texts = Annotated[str | Annotated[list[str], Meta(min_length=1)], Meta(description="One text, or several.")]
Activation = Annotated[
    bool | None, Meta(description="true: the sigmoid of each score; the order stays. Otherwise the raw scores.")
]
Nothing = Annotated[
    dict[str, Any] | None,
    Meta(
        description="There is no template and no image: only null or {} is taken.",
        extra_json_schema={"maxProperties": 0},
    ),
]

NoLimit = (
    Annotated[
        int,
        Meta(
            ge=0,
            description="0, or at least as many tokens as the model takes: neither cuts. Smaller values are refused.",
        ),
    ]
    | None
)


class PoolingOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both /score and /rerank."""

    model: Annotated[str | None, Meta(description="The served model's name; null or empty: whichever there is.")] = None
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, description="-1, or the most tokens that the model takes: longer pairs are cut.")]
        | None
    ) = None
    use_activation: Activation = None
    activation: Activation = None
    softmax: Annotated[
        bool | None,
        Meta(description="Refused if true: over one score it is always 1.", extra_json_schema={"enum": [False, None]}),
    ] = None
    max_tokens_per_query: NoLimit = None
    max_tokens_per_doc: NoLimit = None
    truncation_side: Annotated[
        Literal["left", "right"] | None,
        Meta(description="Texts are cut at their ends: left is refused.", extra_json_schema={"enum": ["right", None]}),
    ] = None
    instruction: Annotated[
        str | None,
        Meta(
            description="Refused unless empty: the query is what Cappy calls the instruction.",
            extra_json_schema={"enum": ["", None]},
        ),
    ] = None
    chat_template_kwargs: Nothing = None
    mm_processor_kwargs: Nothing = None
    request_id: Annotated[str | None, Meta(description="Comes back in the answer's id.")] = None
    user: Annotated[str | None, Meta(description="Ignored: it cannot change a score.")] = None
    priority: Annotated[int, Meta(description="Ignored: it cannot change a score.")] | None = None
    padding: Annotated[
        Literal["max_length", "do_not_pad"] | None, Meta(description="Ignored: it cannot change a score.")
    ] = None
    encoding_format: Annotated[
        Literal["float"] | None, Meta(description="Scores are numbers, whether asked for or not.")
    ] = None
    cache_salt: Annotated[str | None, Meta(description="Ignored: it cannot change a score.")] = None


class VllmTextRequest(PoolingOptions):
    """Texts to score: one `text_1` for all of `text_2`, or as many."""

    text_1: Texts
    text_2: Texts


class VllmDocumentsRequest(PoolingOptions):
    """Texts to score: one query for all documents, or as many."""

    queries: Texts
    documents: Texts


class VllmItemsRequest(PoolingOptions):
    """Texts to score: one query for all items, or as many."""

    queries: Texts
    items: Texts


class VllmDataRequest(PoolingOptions):
    """Texts to score: one `data_1` for all of `data_2`, or as many."""

    data_1: Texts
    data_2: Texts


class VllmScore(msgspec.Struct, frozen=True):
    """The score of the pair at `index`."""

    index: Annotated[int, Meta(ge=0)]
    score: float
    object: Literal["score"] = "score"


class VllmUsage(msgspec.Struct, frozen=True):
    """Tokens of all pairs."""

    prompt_tokens: Annotated[int, Meta(ge=0)]
    total_tokens: Annotated[int, Meta(ge=0)]
    completion_tokens: Annotated[int, Meta(ge=0)] = 0
    prompt_tokens_details: None = None


class VllmScoreAnswer(msgspec.Struct, frozen=True):
    """The scores of pairs, in their order."""

    id: str
    created: Annotated[int, Meta(ge=0, description="Seconds since 1970.")]
    model: str
    data: list[VllmScore]
    usage: VllmUsage
    object: Literal["list"] = "list"


SCORE_SHAPES: tuple[tuple[str, str, type[PoolingOptions]], ...] = (
    ("text_1", "text_2", VllmTextRequest),
    ("queries", "documents", VllmDocumentsRequest),
    ("queries", "items", VllmItemsRequest),
    ("data_1", "data_2", VllmDataRequest),
)
"""How the two texts of a pair may be called, and the request that calls them so."""


def read_score(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read texts to score: 1 and N, or N and N. Raises InvalidRequest.

    >>> read_score(b'{"text_1": "Is the sky blue?", "text_2": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    there = field_names(body)
    for first, second, shape in SCORE_SHAPES:
        if second in there or (first in there and first != "queries"):
            asked = decoded(body, shape)
            pairs = _pairs(first, getattr(asked, first), second, getattr(asked, second))
            too_long = check_options(asked, model, without_limit="refuse")
            return ScoringRequest(pairs, partial(_answer, asked), too_long)
    wanted = ", or ".join(f"`{first}` and `{second}`" for first, second, _ in SCORE_SHAPES)
    raise InvalidRequest(f"the body: found none of the pairs of fields {wanted}")


def check_options(asked: PoolingOptions, model: ServedModel, *, without_limit: TooLong) -> TooLong:
    """Refuse what cannot be honoured, and say what happens to pairs that are too long.

    `without_limit` is that where `truncate_prompt_tokens` says nothing. Raises InvalidRequest.

        >>> check_options(VllmTextRequest(text_1="", text_2=""), model, without_limit="refuse")
        'refuse'
    """
    model.check_name(asked.model)
    wants_sigmoid(use_activation=asked.use_activation, activation=asked.activation)
    most, cut = model.max_length, f"a pair is cut where it has {model.max_length} tokens, and nowhere else"
    refuse_others("truncate_prompt_tokens", asked.truncate_prompt_tokens, (None, -1, most), cut)
    for name in ("max_tokens_per_query", "max_tokens_per_doc"):
        limit: int | None = getattr(asked, name)
        if limit is None or limit < most:
            refuse_others(name, limit, (None, 0, most), cut)
    refuse_others("truncation_side", asked.truncation_side, (None, "right"), "texts are cut at their ends")
    refuse_others("softmax", asked.softmax, (None, False), "a softmax over one score is always 1")
    refuse_others("instruction", asked.instruction, (None, ""), "the query is what Cappy calls the instruction")
    refuse_others("chat_template_kwargs", asked.chat_template_kwargs, (None, {}), "there is no chat template")
    refuse_others("mm_processor_kwargs", asked.mm_processor_kwargs, (None, {}), "there are texts only")
    return without_limit if asked.truncate_prompt_tokens is None else "truncate"


def _pairs(first: str, queries: str | list[str], second: str, documents: str | list[str]) -> list[Pair]:
    """Pair one query with every document, or each with its own."""
    ones = [queries] if isinstance(queries, str) else queries
    others = [documents] if isinstance(documents, str) else documents
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise InvalidRequest(
            f"$.{first}: has {len(ones)} texts and {second} has {len(others)}; send one {first} for all, or as many as "
            f"{second} has"
        )
    return list(zip(ones, others, strict=True))


def _answer(asked: PoolingOptions, result: ScoringResult) -> VllmScoreAnswer:
    is_sigmoid = wants_sigmoid(use_activation=asked.use_activation, activation=asked.activation)
    tokens = result.tokens
    return VllmScoreAnswer(
        id=f"score-{asked.request_id or result.request_id}",
        created=result.created,
        model=result.model.name,
        data=[VllmScore(place, score) for place, score in enumerate(scores_of(result, is_sigmoid=is_sigmoid))],
        usage=VllmUsage(tokens, tokens),
    )
