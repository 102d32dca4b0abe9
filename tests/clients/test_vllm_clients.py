"""Clients of vLLM: what its documentation and its own benchmark send."""

from __future__ import annotations

import httpx
import pytest

from tests.clients.conftest import DOCUMENTS, QUESTION, Server


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_one_text_is_scored_with_many(server: Server, path: str) -> None:
    body = {
        "model": "cappy-mini",
        "encoding_format": "float",
        "text_1": QUESTION,
        "text_2": DOCUMENTS,
        "truncate_prompt_tokens": -1,
    }
    found = httpx.post(f"{server.url}{path}", json=body, headers=server.headers).json()
    assert [(each["index"], each["score"]) for each in found["data"]] == list(enumerate(server.scores))
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 0


def test_a_text_that_is_too_long_is_refused_as_vllm_does(server: Server) -> None:
    body = {"model": "cappy-mini", "text_1": QUESTION, "text_2": DOCUMENTS}
    reply = httpx.post(f"{server.url}/score", json=body, headers=server.headers)
    assert (reply.status_code, reply.json()["pair"]) == (422, len(DOCUMENTS) - 1)


def test_the_request_of_vllms_benchmark(server: Server) -> None:
    """`vllm bench serve --backend vllm-rerank` sends this, and reads the status and `usage.prompt_tokens`."""
    body = {"model": "cappy-mini", "query": QUESTION, "documents": DOCUMENTS, "truncate_prompt_tokens": -1}
    headers = {"Content-Type": "application/json", "x-request-id": "bench-0", **server.headers}
    reply = httpx.post(f"{server.url}/rerank", json=body, headers=headers)
    assert reply.status_code == 200
    found = reply.json()
    assert found["usage"]["prompt_tokens"] == int(reply.headers["x-cappy-tokens"]) > 0
    assert [(each["index"], each["relevance_score"]) for each in found["results"]] == server.ranked
    assert found["results"][0]["document"]["text"] == DOCUMENTS[server.order[0]]
    assert found["id"] == "rerank-bench-0"
