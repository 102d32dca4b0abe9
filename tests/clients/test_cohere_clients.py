"""Clients of Cohere: its SDK, LangChain's and LlamaIndex' rerankers."""

from __future__ import annotations

import cohere
import pytest
from cohere.core.api_error import ApiError
from langchain_cohere import CohereRerank as LangChainRerank
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaRerank
from pydantic import SecretStr

from tests.clients.conftest import DOCUMENTS, KEY, QUESTION, Server

MODEL = "cappy-mini"


@pytest.mark.parametrize("kind", [cohere.Client, cohere.ClientV2])
def test_the_sdk_ranks(server: Server, kind: type[cohere.Client] | type[cohere.ClientV2]) -> None:
    client = kind(api_key=KEY, base_url=server.url)
    found = client.rerank(model=MODEL, query=QUESTION, documents=DOCUMENTS)
    assert [(each.index, each.relevance_score) for each in found.results] == server.ranked
    assert found.meta is not None
    assert found.meta.tokens is not None
    assert found.meta.tokens.input_tokens
    assert found.meta.warnings == [
        f"1 of {len(DOCUMENTS)} pairs were truncated, the first is pair {len(DOCUMENTS) - 1}"
    ]
    best = client.rerank(model=MODEL, query=QUESTION, documents=DOCUMENTS, top_n=2)
    assert [each.index for each in best.results] == server.order[:2]


def test_the_first_sdk_gets_its_documents_back(server: Server) -> None:
    client = cohere.Client(api_key=KEY, base_url=server.url)
    documents = [{"text": text, "title": str(place)} for place, text in enumerate(DOCUMENTS)]
    found = client.rerank(query=QUESTION, documents=documents, return_documents=True, top_n=3)
    assert [each.document.text for each in found.results if each.document] == [
        DOCUMENTS[place] for place in server.order[:3]
    ]


def test_the_sdk_tells_what_is_wrong(server: Server) -> None:
    client = cohere.ClientV2(api_key=KEY, base_url=server.url)
    with pytest.raises(ApiError) as caught:
        client.rerank(model="rerank-v3.5", query=QUESTION, documents=DOCUMENTS)
    assert caught.value.status_code == 404
    assert "is not served here, only cappy-mini" in str(caught.value)
    with pytest.raises(ApiError) as caught:
        client.rerank(model=MODEL, query=QUESTION, documents=DOCUMENTS, max_tokens_per_doc=10)
    assert caught.value.status_code == 422
    wrong = cohere.ClientV2(api_key="a-key-that-nobody-has", base_url=server.url)
    with pytest.raises(ApiError) as caught:
        wrong.rerank(model=MODEL, query=QUESTION, documents=DOCUMENTS)
    assert caught.value.status_code == 401


def test_langchain_ranks(server: Server) -> None:
    reranker = LangChainRerank(model=MODEL, base_url=server.url, cohere_api_key=SecretStr(KEY), top_n=3)
    documents = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(DOCUMENTS)]
    found = reranker.compress_documents(documents, QUESTION)
    assert [(each.metadata["place"], each.metadata["relevance_score"]) for each in found] == server.ranked[:3]


def test_llama_index_ranks(server: Server) -> None:
    reranker = LlamaRerank(model=MODEL, api_key=KEY, base_url=server.url, top_n=3)
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(DOCUMENTS)]
    found = reranker.postprocess_nodes(nodes, QueryBundle(QUESTION))
    assert [(int(each.node.node_id), each.score) for each in found] == server.ranked[:3]
