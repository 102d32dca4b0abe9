"""Read the rerank requests of Cohere, Jina, vLLM and infinity, and write their answers. Knows nothing of HTTP.

All send a query and documents, and read `results` with `index` and `relevance_score`. Published types:
`cohere/v2/client.py` and `cohere/base_client.py` of Cohere's SDK, `vllm/entrypoints/pooling/scoring/protocol.py`, and
infinity's `fastapi_schemas/pymodels.py`; Jina's are Cohere's with `usage`. What differs here: scores are raw, and what
cannot be honoured is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cappy_engine.errors import InvalidRequest
from cappy_engine.pairs import candidate_pairs
from cappy_engine.serving.dialects.reading import (
    decoded,
    ranked_places,
    refuse_others,
    scores_of,
    wants_sigmoid,
)
from cappy_engine.serving.dialects.vllm import PoolingOptions, check_options
from cappy_engine.serving.requests import ScoringRequest, ScoringResult, ServedModel

Document = Annotated[
    dict[str, str],
    Meta(
        description="A document: `text` is ranked, other fields come back with it.",
        extra_json_schema={"required": ["text"]},
    ),
]


class RerankRequest(PoolingOptions):
    """Holds documents to rank for a query. It has all fields of Cohere, Jina, vLLM and infinity."""

    query: Annotated[str, Meta(description="The instruction.", examples=["Is the sky blue?"])]
    documents: Annotated[
        str | Annotated[list[str | Document], Meta(min_length=1)],
        Meta(description="The responses: texts, or objects with `text`."),
    ]
    top_n: Annotated[int, Meta(ge=1, description="How many of the best are listed; null: all.")] | None = None
    return_documents: Annotated[
        bool | None, Meta(description="Whether the answer holds the documents. null: /rerank does, /v1 and /v2 do not.")
    ] = None
    rank_fields: Annotated[
        list[str] | None,
        Meta(
            description='Refused unless ["text"]: the one field that is ranked.',
            extra_json_schema={"enum": [["text"], None]},
        ),
    ] = None
    max_chunks_per_doc: Annotated[
        int | None,
        Meta(
            description="Refused unless 1: long documents are cut, not ranked in chunks.",
            extra_json_schema={"enum": [1, None]},
        ),
    ] = None
    raw_scores: Annotated[
        bool | None, Meta(description="false: the sigmoid of each score; the order stays. Otherwise the raw scores.")
    ] = None


class RerankResult(msgspec.Struct, frozen=True):
    """A document and its score."""

    index: Annotated[int, Meta(ge=0, description="Its place in the list that was sent.")]
    relevance_score: Annotated[float, Meta(description="The raw score, or with raw_scores false its sigmoid.")]
    document: dict[str, str] | UnsetType = UNSET


class RerankUsage(msgspec.Struct, frozen=True):
    """Tokens of all pairs, where Jina, vLLM and infinity have them."""

    prompt_tokens: Annotated[int, Meta(ge=0)]
    total_tokens: Annotated[int, Meta(ge=0)]


class ApiVersion(msgspec.Struct, frozen=True):
    """The version of Cohere's interface."""

    version: Literal["1", "2"]


class RerankTokens(msgspec.Struct, frozen=True):
    """Tokens of all pairs, where Cohere has them."""

    input_tokens: Annotated[int, Meta(ge=0)]
    output_tokens: Annotated[int, Meta(ge=0)] = 0


class RerankMeta(msgspec.Struct, frozen=True):
    """What Cohere tells about a request. `warnings` name pairs that were cut, or have no instruction."""

    api_version: ApiVersion
    tokens: RerankTokens
    warnings: list[str] | UnsetType = UNSET


class RerankAnswer(msgspec.Struct, frozen=True):
    """The documents, the best first; the first wins a tie."""

    id: str
    model: str
    results: list[RerankResult]
    usage: RerankUsage
    meta: RerankMeta
    object: Literal["list"] = "list"


def read_v1(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read documents to rank, sent to /v1/rerank. Raises InvalidRequest.

    >>> read_v1(b'{"query": "Is the sky blue?", "documents": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    return _read(body, model, "1", returns_documents=False)


def read_v2(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read documents to rank, sent to /v2/rerank. Raises InvalidRequest.

    >>> read_v2(b'{"query": "Is the sky blue?", "documents": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    return _read(body, model, "2", returns_documents=False)


def read_rerank(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read documents to rank, sent to /rerank, where vLLM's answers hold the documents. Raises InvalidRequest.

    >>> read_rerank(b'{"query": "Is the sky blue?", "documents": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    return _read(body, model, "1", returns_documents=True)


def _read(body: bytes, model: ServedModel, version: Literal["1", "2"], *, returns_documents: bool) -> ScoringRequest:
    asked = decoded(body, RerankRequest)
    too_long = check_options(asked, model, without_limit="truncate")
    refuse_others("rank_fields", asked.rank_fields, (None, ["text"]), "`text` is the one field that is ranked")
    refuse_others(
        "max_chunks_per_doc", asked.max_chunks_per_doc, (None, 1), "long documents are cut, not ranked in chunks"
    )
    documents = _documents(asked)
    is_sigmoid = _is_sigmoid(asked)
    shown = documents if _either(asked.return_documents, returns_documents) else None
    pairs = candidate_pairs(asked.query, [document["text"] for document in documents])
    return ScoringRequest(pairs, partial(_answer, asked, version, is_sigmoid, shown), too_long)


def _documents(asked: RerankRequest) -> list[dict[str, str]]:
    """Return the documents as objects with a `text`."""
    listed = [asked.documents] if isinstance(asked.documents, str) else asked.documents
    documents = [{"text": each} if isinstance(each, str) else each for each in listed]
    for place, document in enumerate(documents):
        if "text" not in document:
            raise InvalidRequest(f"$.documents[{place}]: object missing required field `text`")
    return documents


def _is_sigmoid(asked: RerankRequest) -> bool:
    return wants_sigmoid(raw_scores=asked.raw_scores, use_activation=asked.use_activation, activation=asked.activation)


def _either(asked: bool | None, default: bool) -> bool:
    return default if asked is None else asked


def _answer(
    asked: RerankRequest,
    version: Literal["1", "2"],
    is_sigmoid: bool,
    shown: list[dict[str, str]] | None,
    result: ScoringResult,
) -> RerankAnswer:
    scores = scores_of(result, is_sigmoid=is_sigmoid)
    tokens = result.tokens
    return RerankAnswer(
        id=f"rerank-{asked.request_id or result.request_id}",
        model=result.model.name,
        results=[
            RerankResult(place, scores[place], shown[place] if shown else UNSET)
            for place in ranked_places(result, asked.top_n)
        ],
        usage=RerankUsage(tokens, tokens),
        meta=RerankMeta(ApiVersion(version), RerankTokens(tokens), list(result.scored.remarks()) or UNSET),
    )
