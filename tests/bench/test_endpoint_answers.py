"""An answer of an endpoint is a whole text, or an error at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.candidates.decodings import Candidates, choose_decodings
from cappy_bench.candidates.endpoint import Endpoint
from cappy_bench.candidates.sample_options import EndpointOptions, SampleOptions
from cappy_bench.candidates.sampling import sample_file
from cappy_engine.errors import SampleError
from tests.support.small_endpoint import Server, answered, refused, serving, text_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as state:
        yield state


def ask(server: Server, *, api: Any = "chat", max_retries: int = 0) -> Candidates:
    endpoint = Endpoint(server.url, "small", EndpointOptions(api=api, max_retries=max_retries))
    return endpoint.sample(["a"], choose_decodings(["greedy"]), seed=0)[0]


NUMBERS: list[list[Any]] = [[True], [0.5], [-1.0, 5.0], [{"logprob": True}], [{"logprob": 0.5}]]
"""That are the logarithm of no probability."""


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


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({}, "has no message, but finish_reason, index, logprobs$"),
        ({"message": None}, "has a message of a wrong kind: NoneType None$"),
        ({"message": "It is 5."}, r"has a message of a wrong kind: str 'It is 5\.'$"),
        ({"message": []}, r"has a message of a wrong kind: list \[\]$"),
        ({"delta": {"content": "It is 5."}}, "has no message, but delta, finish_reason, index, logprobs$"),
    ],
    ids=str,
)
def test_an_answer_without_a_message_is_an_error_that_says_what_came(message: Any, what: str, server: Server) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        status, document = answered(body)
        del document["choices"][0]["message"]
        document["choices"][0] |= message
        return status, document

    server.answer = answer
    with pytest.raises(SampleError, match=f"the endpoint's answer to instruction 1 {what}"):
        ask(server)


def test_an_answer_of_the_other_api_is_an_error(server: Server) -> None:
    asked = {"chat": "completions", "completions": "chat"}
    for api, other in asked.items():
        server.answer = lambda body: answered(
            {"n": 1, "model": "small"} | ({"prompt": "a"} if "messages" in body else {"messages": [{"content": "a"}]})
        )
        lacks = "message" if api == "chat" else "text"
        with pytest.raises(SampleError, match=f"instruction 1 has no {lacks}, but .*; is it one for --api {other}"):
            ask(server, api=api)


def test_an_empty_answer_is_an_empty_text(server: Server) -> None:
    """A model may say nothing, or think until it ends; OpenAI writes null."""
    server.answer = lambda body: answered(body, message={"role": "assistant", "content": None}, logprobs=None)
    assert [sample.text for sample in ask(server).samples] == [""]
    server.answer = lambda body: answered(body, message={"role": "assistant", "content": None})
    assert [(sample.text, sample.tokens) for sample in ask(server).samples] == [("", 2)], "they have no text"
    server.answer = lambda body: answered(body, message=None, finish_reason="content_filter", logprobs=None)
    assert [(sample.text, sample.is_cut) for sample in ask(server).samples] == [("", True)]
    server.answer = lambda body: answered(body, text="", logprobs=None)
    assert [sample.text for sample in ask(server, api="completions").samples] == [""]


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("reason", ["error", "abort", "cancelled", "timeout"])
def test_an_answer_that_the_server_gave_up_is_an_error(reason: str, api: str, server: Server) -> None:
    server.answer = lambda body: answered(body, finish_reason=reason)
    with pytest.raises(SampleError, match=f"did not finish its answer to instruction 1: {reason}; ask again"):
        ask(server, api=api)


def test_an_error_within_an_answer_is_told(server: Server) -> None:
    """OpenRouter answers with 200 where the provider behind it failed."""
    error = {"code": 502, "message": "the provider went away"}
    server.answer = lambda body: answered(body, error=error)
    with pytest.raises(SampleError, match="did not finish its answer to instruction 1: the provider went away;"):
        ask(server)
    server.answer = lambda body: (200, {"error": error})
    with pytest.raises(SampleError, match=r"no choice for instruction 1 \(greedy\): the provider went away"):
        ask(server)
    server.answer = lambda body: (200, {"error": "busy"})
    with pytest.raises(SampleError, match=r"no choice for instruction 1 \(greedy\): busy"):
        ask(server)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b'{"choices": [' + b" " * 99 + b"no", r"""'{"choices": \[ {67}'$"""),
        (b"[" * 100_000, r"'\[{80}'$"),
        (b'{"choices": "\xff"}', r"""'{"choices": "\ufffd"}'$"""),
        (b"<html>", "'<html>'$"),
        (b"", "nothing$"),
    ],
    ids=lambda each: ascii(each[:12]),
)
def test_an_answer_that_is_not_json_is_an_error_that_shows_it(content: bytes, shown: str, server: Server) -> None:
    server.answer = lambda body: (200, content)
    problem = r"failed on instruction 1 \(greedy; 1 characters\): the answer is not JSON \(.*\): "
    for api in ("chat", "completions"):
        with pytest.raises(SampleError, match=problem + shown):
            ask(server, api=api)


def test_an_answer_that_is_not_json_is_asked_for_again(server: Server) -> None:
    server.answer = lambda body: answered(body) if len(server.bodies) > 1 else (200, b'{"choices": [')
    assert [sample.text for sample in ask(server, max_retries=1).samples] == ["a 0"]
    assert len(server.bodies) == 2
    server.answer = lambda body: (200, b'{"choices": [')
    with pytest.raises(SampleError, match="is not JSON"):
        ask(server, max_retries=1)
    assert server.bodies == server.bodies[:1] * 4


@pytest.mark.parametrize("content", [b"[1, 2]", b"null", b'"hi"', b'{"detail": "Not Found"}'], ids=ascii)
def test_an_answer_of_another_form_is_shown(content: bytes, server: Server) -> None:
    server.answer = lambda body: (200, content)
    shown = re.escape(repr(content.decode()))
    with pytest.raises(SampleError, match=rf"gave no choice for instruction 1 \(greedy\); it answered {shown}$"):
        ask(server)


def test_an_error_names_the_instruction_by_its_place_in_the_file(server: Server, tmp_path: Path) -> None:
    lines = [f'{{"instruction": "{letter}"}}'.encode() for letter in "abcdefg"]
    options, endpoint = SampleOptions(batch_size=3), Endpoint(server.url, "small")
    greedy = choose_decodings(["greedy"])
    for changes, problem in (
        (None, r"failed on instruction 5 \(greedy"),
        ({"finish_reason": "error"}, "answer to instruction 5: error"),
        ({"message": "e"}, "answer to instruction 5 has a message of a wrong kind"),
        ({"message": {"content": 5}}, "answer to instruction 5 is not a text"),
        ({"logprobs": None}, "log-likelihoods for instruction 5, though"),
    ):
        server.answer = lambda body, changes=changes: (  # type: ignore[misc]
            answered(body) if text_of(body) != "e" else refused("no") if changes is None else answered(body, **changes)
        )
        with pytest.raises(SampleError, match=f"in the batch of examples 4 to 6: .*{problem}"):
            sample_file(lines, tmp_path / f"{len(problem)}.jsonl", endpoint, greedy, options)
    server.answer = answered
    for first in (1, 4):
        endpoint.sample(["z"], greedy, seed=0, first=first)
    one, other = [body for body in server.bodies if text_of(body) == "z"]
    assert one == other


@pytest.mark.parametrize("words", ["Too long", "Too long."])
def test_advice_is_a_sentence_of_its_own(words: str, server: Server) -> None:
    server.answer = lambda body: refused(words)
    with pytest.raises(SampleError, match=r"Error code: 400 - Too long\. If it is the prompt"):
        ask(server)


@pytest.mark.parametrize("choices", [[None], ["It is 5."], [[]], [5]], ids=str)
def test_a_choice_that_is_not_an_object_is_an_error(choices: Any, server: Server) -> None:
    server.answer = lambda body: (200, {"choices": choices})
    for api in ("chat", "completions"):
        with pytest.raises(SampleError, match=r"gave no choice for instruction 1 \(greedy\)"):
            ask(server, api=api)


@pytest.mark.parametrize("values", ["abc", 5, ["x"], [{"logprob": "x"}], *NUMBERS], ids=str)
def test_log_likelihoods_of_another_form_are_an_error(values: Any, server: Server) -> None:
    server.answer = lambda body: answered(body, logprobs={"content": values, "token_logprobs": values})
    for api in ("chat", "completions"):
        with pytest.raises(SampleError, match=r"no log-likelihoods for instruction 1, though .*--no-log-likelihoods"):
            ask(server, api=api)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\r", " sk-secret", "sk-secret\u2026", "sk secret"], ids=ascii)
def test_a_key_that_cannot_be_sent_is_an_error_without_the_key(
    key: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SampleError, match=r"OPENAI_API_KEY .* at character ") as caught:
        ask(server)
    assert "secret" not in str(caught.value)
    assert server.bodies == []


@pytest.mark.parametrize("tail", ["?api-key=secret", "#secret"])
def test_a_url_with_more_behind_its_path_is_refused_without_it(tail: str, server: Server) -> None:
    with pytest.raises(SampleError, match=r"is not an endpoint's URL; .*OPENAI_API_KEY") as caught:
        Endpoint(server.url + tail, "small")
    assert "secret" not in str(caught.value)
