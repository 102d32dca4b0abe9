"""An answer of an endpoint is a text, or an error at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cappy_bench.candidates.decodings import Candidates, choose_decodings
from cappy_bench.candidates.endpoint import Endpoint
from cappy_bench.candidates.sample_options import EndpointOptions
from cappy_engine.errors import SampleError
from tests.support.small_endpoint import Server, answered, serving


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as state:
        yield state


def ask(server: Server, *, api: Any = "chat") -> Candidates:
    endpoint = Endpoint(server.url, "small", EndpointOptions(api=api))
    return endpoint.sample(["a"], choose_decodings(["greedy"]), seed=0)[0]


def test_an_answer_in_parts_is_the_text_of_all_of_them(server: Server) -> None:
    parts = [{"type": "text", "text": "It is"}, {"type": "text", "text": " 5."}]
    server.answer = lambda body: answered(body, message={"role": "assistant", "content": parts})
    assert [sample.text for sample in ask(server).samples] == ["It is 5."]


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": "a"}, IMAGE]},
        {"content": [{"type": "text"}]},
        {"content": [{"type": "text", "text": 5}]},
        {"content": {"type": "thinking", "text": "5"}},
        {"content": 5},
        {"content": "\ud83d"},
        {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"content": "see", "function_call": {"name": "f", "arguments": ""}},
    ],
    ids=str,
)
def test_an_answer_that_is_not_a_text_is_an_error_at_once(message: Any, server: Server) -> None:
    server.answer = lambda body: answered(body, message={"role": "assistant", **message})
    with pytest.raises(SampleError, match="the endpoint's answer to instruction 1 is not a text: a part "):
        ask(server)


@pytest.mark.parametrize("text", [5, {"text": "a"}, [5]], ids=str)
def test_a_completion_that_is_not_a_text_is_an_error(text: Any, server: Server) -> None:
    server.answer = lambda body: answered(body, text=text)
    with pytest.raises(SampleError, match="the endpoint's answer to instruction 1 is not a text: a part "):
        ask(server, api="completions")
