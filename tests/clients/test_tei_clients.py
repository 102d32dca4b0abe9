"""Clients of text-embeddings-inference: LlamaIndex' reranker, and what its README has curl send."""

from __future__ import annotations

import math

import httpx
import pytest
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

from tests.clients.conftest import DOCUMENTS, QUESTION, Server


def test_llama_index_ranks(server: Server) -> None:
    reranker = TextEmbeddingInference(
        base_url=server.url, top_n=len(DOCUMENTS), auth_token=server.headers["Authorization"]
    )
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(DOCUMENTS)]
    found = reranker.postprocess_nodes(nodes, QueryBundle(QUESTION))
    assert [(int(each.node.node_id), each.score) for each in found] == server.ranked


def test_rerank_as_the_readme_sends_it(server: Server) -> None:
    body = {"query": QUESTION, "texts": DOCUMENTS, "return_text": True}
    reply = httpx.post(f"{server.url}/rerank", json=body, headers=server.headers)
    assert reply.status_code == 200
    assert reply.json() == [
        {"index": place, "score": score, "text": DOCUMENTS[place]} for place, score in server.ranked
    ]
    assert reply.headers["x-cappy-truncated"] == "1"


def test_predict_takes_one_pair_and_batches(server: Server) -> None:
    one = httpx.post(f"{server.url}/predict", json={"inputs": [QUESTION, DOCUMENTS[0]]}, headers=server.headers)
    assert one.json() == [{"score": server.scores[0], "label": "LABEL_0"}]
    body = {"inputs": [[QUESTION, text] for text in DOCUMENTS]}
    many = httpx.post(f"{server.url}/predict", json=body, headers=server.headers).json()
    assert many == [[{"score": score, "label": "LABEL_0"}] for score in server.scores]


def test_the_sigmoid_comes_where_it_is_asked_for(server: Server) -> None:
    body = {"query": QUESTION, "texts": DOCUMENTS, "raw_scores": False}
    found = httpx.post(f"{server.url}/rerank", json=body, headers=server.headers).json()
    assert [each["index"] for each in found] == server.order
    assert [each["score"] for each in found] == [
        pytest.approx(1 / (1 + math.exp(-score))) for _, score in server.ranked
    ]


def test_errors_are_in_its_words(server: Server) -> None:
    reply = httpx.post(f"{server.url}/predict", json={"inputs": "I like you."}, headers=server.headers)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert "one text is not a pair" in reply.json()["error"]
    refused = {"query": QUESTION, "texts": DOCUMENTS, "truncate": False}
    reply = httpx.post(f"{server.url}/rerank", json=refused, headers=server.headers)
    assert (reply.status_code, reply.json()["pair"]) == (422, len(DOCUMENTS) - 1)
