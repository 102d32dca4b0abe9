"""List what the server answers to POST: the path, who reads the body, and the types of requests and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cappy_engine.errors import InvalidRequest
from cappy_engine.serving.dialects import cohere, kserve, native, tei, vllm
from cappy_engine.serving.dialects.reading import field_names
from cappy_engine.serving.requests import ScoringRequest, ServedModel

Read = Callable[[bytes, ServedModel], ScoringRequest]


@dataclass(frozen=True)
class Route:
    """A path to POST to. `operation` is its name in OpenAPI, `dialects` whose requests it takes.

    With `has_tensors` tensors may follow the JSON: `kserve.read_infer` reads such a body, with the header's value.
    """

    path: str
    operation: str
    summary: str
    dialects: str
    read: Read
    requests: tuple[Any, ...]
    answers: tuple[Any, ...]
    has_tensors: bool = False


def read_score(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read our own request to /v1/score, or vLLM's. Raises InvalidRequest.

    >>> read_score(b'{"text_1": "Is the sky blue?", "text_2": "Yes"}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    try:
        return native.read_score(body, model)
    except InvalidRequest as error:
        if error.status != 422 or not (names := field_names(body)) or "pairs" in names:
            raise
    if not names & {name for first, second, _ in vllm.SCORE_SHAPES for name in (first, second)}:
        raise InvalidRequest("the body: needs `pairs`, or vLLM's `text_1` and `text_2` or `queries` and `documents`")
    return vllm.read_score(body, model)


def read_rerank(body: bytes, model: ServedModel) -> ScoringRequest:
    """Read a request to /rerank: with `texts` it is TEI's, with `documents` Jina's or vLLM's. Raises InvalidRequest.

    >>> read_rerank(b'{"query": "Is the sky blue?", "texts": ["Yes"]}', model).pairs
    [('Is the sky blue?', 'Yes')]
    """
    names = field_names(body)
    if "texts" in names:
        return tei.read_rerank(body, model)
    if "documents" in names:
        return cohere.read_rerank(body, model)
    raise InvalidRequest("the body: needs `texts` (text-embeddings-inference) or `documents` (Cohere, Jina, vLLM)")


_VLLM_SCORES = tuple(shape for _, _, shape in vllm.SCORE_SHAPES)

ROUTES: tuple[Route, ...] = (
    Route(
        path="/v1/score",
        operation="score",
        summary="Score pairs",
        dialects="Cappy, vLLM",
        read=read_score,
        requests=(native.ScoreRequest, *_VLLM_SCORES),
        answers=(native.ScoreAnswer, vllm.VllmScoreAnswer),
    ),
    Route(
        path="/v1/rank",
        operation="rank",
        summary="Rank candidates of one instruction",
        dialects="Cappy",
        read=native.read_rank,
        requests=(native.RankRequest,),
        answers=(native.RankAnswer,),
    ),
    Route(
        path="/rerank",
        operation="rerank",
        summary="Rank texts or documents",
        dialects="text-embeddings-inference, Jina, vLLM, infinity",
        read=read_rerank,
        requests=(tei.TeiRerankRequest, cohere.RerankRequest),
        answers=(list[tei.TeiRank], cohere.RerankAnswer),
    ),
    Route(
        path="/predict",
        operation="predict",
        summary="Score one pair, or a batch of pairs",
        dialects="text-embeddings-inference",
        read=tei.read_predict,
        requests=(tei.TeiPredictRequest,),
        answers=(list[tei.TeiPrediction], list[list[tei.TeiPrediction]]),
    ),
    Route(
        path="/v1/rerank",
        operation="rerank_v1",
        summary="Rank documents",
        dialects="Cohere, Jina, vLLM",
        read=cohere.read_v1,
        requests=(cohere.RerankRequest,),
        answers=(cohere.RerankAnswer,),
    ),
    Route(
        path="/v2/rerank",
        operation="rerank_v2",
        summary="Rank documents",
        dialects="Cohere, vLLM",
        read=cohere.read_v2,
        requests=(cohere.RerankRequest,),
        answers=(cohere.RerankAnswer,),
    ),
    Route(
        path="/score",
        operation="score_vllm",
        summary="Score texts: one and N, or N and N",
        dialects="vLLM",
        read=vllm.read_score,
        requests=_VLLM_SCORES,
        answers=(vllm.VllmScoreAnswer,),
    ),
    Route(
        path="/v2/models/{name}/infer",
        operation="infer",
        summary="Score tensors of texts",
        dialects="KServe v2",
        read=kserve.read_infer,
        requests=(kserve.InferRequest,),
        answers=(kserve.InferAnswer,),
        has_tensors=True,
    ),
)
"""Everything that is posted to."""
