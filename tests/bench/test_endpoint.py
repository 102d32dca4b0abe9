"""An OpenAI-compatible endpoint, by the real client against a small server that speaks the protocol."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cappy_bench.candidates.decodings import DECODINGS, ENDPOINT_DECODINGS, Candidates, Sample, choose_decodings
from cappy_bench.candidates.endpoint import Endpoint
from cappy_bench.candidates.sample_options import EndpointOptions
from cappy_engine.errors import SampleError
from tests.support.absent import EXPORTER, run_without
from tests.support.small_endpoint import Answer, Body, Server, answered, refused, serving, text_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as state:
        yield state


def open_endpoint(url: str, *, max_new_tokens: int = 128, **options: Any) -> Endpoint:
    return Endpoint(url, "small", EndpointOptions(**options), max_new_tokens=max_new_tokens)


def ask(server: Server, instructions: list[str], *names: str, seed: int = 0, **options: Any) -> list[Candidates]:
    return open_endpoint(server.url, **options).sample(instructions, choose_decodings(names or ["sampling"]), seed=seed)


# What is asked for, and what comes back


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_candidates_come_back_in_order_with_the_servers_log_likelihoods(api: str, server: Server) -> None:
    first, second = ask(server, ["\na ", "b"], "top-p", "greedy", api=api)
    assert first.samples == (
        *(Sample(f"\na  {n}", "top-p", -1.5 - n, 2, bool(n % 2)) for n in range(4)),
        Sample("\na  0", "greedy", -1.5, 2, False),
    )
    assert [sample.text for sample in second.samples] == ["b 0", "b 1", "b 2", "b 3", "b 0"]
    assert set(server.paths) == {"/v1/chat/completions" if api == "chat" else "/v1/completions"}


def test_every_number_is_sent(server: Server) -> None:
    ask(server, ["a"], "greedy", *(name for name in DECODINGS if name not in ("beam", "greedy")), max_new_tokens=7)
    sent = sorted((body["n"], body["temperature"], body["top_p"], body.get("top_k", 0)) for body in server.bodies)
    assert sent == [(1, 0.0, 1.0, 0), (4, 0.9, 1.0, 0), (4, 1.0, 0.95, 0), (4, 1.0, 1.0, 0), (4, 1.0, 1.0, 40)]
    for body in server.bodies:
        assert body["messages"] == [{"role": "user", "content": "a"}]
        assert (body["model"], body["max_tokens"], body["logprobs"]) == ("small", 7, True)
        assert "stream" not in body or not body["stream"]


def test_completions_send_the_instruction_as_it_is(server: Server) -> None:
    ask(server, ["\n a"], api="completions")
    (body,) = server.bodies
    assert (body["prompt"], body["logprobs"], body["max_tokens"]) == ("\n a", 1, 128)


def test_more_may_be_sent_and_another_name_for_the_limit(server: Server) -> None:
    extra = {"top_k": -1, "min_p": 0.0}
    ask(server, ["a"], "sampling", "top-k", extra_body=extra, uses_max_completion_tokens=True, concurrent=1)
    assert [(body["top_k"], body["min_p"]) for body in server.bodies] == [(-1, 0.0), (40, 0.0)]
    assert all("max_tokens" not in body and body["max_completion_tokens"] == 128 for body in server.bodies)


def test_seeds_are_of_their_own_and_the_same_each_time(server: Server) -> None:
    ask(server, ["a", "b"], "sampling", "top-p", seed=3, concurrent=1)
    ask(server, ["a", "b"], "sampling", "top-p", seed=3, concurrent=1)
    ask(server, ["a", "b"], "sampling", "top-p", seed=4, concurrent=1)
    seeds = [body["seed"] for body in server.bodies]
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 8


@pytest.mark.parametrize(("environment", "sent"), [(None, "Bearer none"), ("sk-1", "Bearer sk-1")])
def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    environment: str | None, sent: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment:
        monkeypatch.setenv("OPENAI_API_KEY", environment)
    ask(server, ["a"])
    assert server.keys == [sent]
    assert "sk-1" not in json.dumps(dict(Endpoint(server.url, "small").facts))


def test_the_default_decodings_are_those_that_every_endpoint_has(server: Server) -> None:
    (each,) = Endpoint(server.url, "small").sample(["a"], ENDPOINT_DECODINGS, seed=0)
    assert [sample.decoding for sample in each.samples] == [
        name for name in ("sampling", "temperature", "top-p") for _ in range(4)
    ]
    assert all("top_k" not in body for body in server.bodies)


def test_as_many_requests_run_at_once_as_asked_for_and_no_more(server: Server) -> None:
    together = threading.Barrier(3, timeout=30)  # no request is answered before three have come

    def answer(body: Body) -> Answer:
        together.wait()
        return answered(body)

    server.answer = answer
    ask(server, ["a"] * 9, concurrent=3)
    assert (len(server.bodies), server.most_running) == (9, 3)


# Servers that give less


@pytest.mark.parametrize("given", [1, 3])
def test_a_server_that_gives_fewer_choices_is_asked_for_the_rest_by_another_seed(given: int, server: Server) -> None:
    server.answer = lambda body: answered(body, min(given, body["n"]))
    (each,) = ask(server, ["a"])
    assert len(each.samples) == 4
    assert [body["n"] for body in server.bodies] == ([4, 3, 2, 1] if given == 1 else [4, 1])
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies)


def test_a_server_that_gives_too_many_choices_is_taken_at_the_count(server: Server) -> None:
    server.answer = lambda body: answered(body, 9)
    assert len(ask(server, ["a"])[0].samples) == 4


@pytest.mark.parametrize(("most", "asked"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])])
def test_a_request_asks_for_at_most_so_many_choices(most: int, asked: list[int], server: Server) -> None:
    assert len(ask(server, ["a"], max_choices=most)[0].samples) == 4
    assert [body["n"] for body in server.bodies] == asked


@pytest.mark.parametrize("content", [{"choices": []}, {"choices": None}, {}, b"<html>", []], ids=str)
def test_an_answer_without_choices_is_an_error(content: Any, server: Server) -> None:
    server.answer = lambda body: (200, content)
    with pytest.raises(SampleError, match="instruction 1"):
        ask(server, ["a"], max_retries=0)


@pytest.mark.parametrize(
    "message", [{"role": "assistant", "content": None}, {"role": "assistant", "content": ""}], ids=str
)
def test_an_answer_without_text_is_an_empty_candidate(message: Any, server: Server) -> None:
    server.answer = lambda body: answered(body, message=message, logprobs=None)
    (each,) = ask(server, ["a"], "greedy")
    assert each.samples == (Sample("", "greedy", None, None, False),)


def test_a_refusal_is_an_empty_candidate_and_a_warning(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I will not."}
    server.answer = lambda body: answered(body, message=message, logprobs={"content": None, "refusal": []})
    caplog.set_level(logging.WARNING, logger="cappy_bench.candidates.endpoint")
    (each,) = ask(server, ["a"], "greedy")
    assert each.samples == (Sample("", "greedy", None, None, False),)
    assert "an instruction was refused (greedy): I will not. It begins with 'a'" in caplog.text


# Errors


def test_a_server_that_is_busy_is_asked_again(server: Server) -> None:
    server.answer = lambda body: answered(body) if len(server.bodies) > 3 else refused("slow down", 429)
    assert len(ask(server, ["a"])[0].samples) == 4
    assert len(server.bodies) == 4


def test_a_server_that_stays_busy_is_an_error(server: Server) -> None:
    server.answer = lambda body: refused("slow down", 503)
    with pytest.raises(SampleError, match=r"failed on instruction 1 \(sampling; 1 characters\): .*slow down"):
        ask(server, ["a"], max_retries=1)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_server_that_refuses_log_likelihoods_is_an_error_that_names_the_option(api: str, server: Server) -> None:
    server.answer = lambda body: refused("logprobs are not supported") if body.get("logprobs") else answered(body)
    with pytest.raises(SampleError, match=r"logprobs are not supported.* by --no-log-likelihoods"):
        ask(server, ["a"], api=api)
    (each,) = ask(server, ["a"], api=api, without_log_likelihoods=True)
    assert each.samples[1] == Sample("a 1", "sampling", None, None, True)
    assert all("logprobs" not in body for body in server.bodies[1:])


@pytest.mark.parametrize(
    "logprobs",
    [None, {"content": None}, {"content": []}, {"content": [{"token": "x", "bytes": None, "top_logprobs": []}]}],
    ids=str,
)
def test_log_likelihoods_that_are_silently_missing_are_an_error(logprobs: Any, server: Server) -> None:
    server.answer = lambda body: answered(body, logprobs=logprobs)
    with pytest.raises(SampleError, match=r"no log-likelihoods for instruction 1, though .*--no-log-likelihoods"):
        ask(server, ["a"])


@pytest.mark.parametrize("values", [None, [], [None, -1.0]], ids=str)
def test_so_are_those_of_completions(values: Any, server: Server) -> None:
    server.answer = lambda body: answered(body, logprobs={"token_logprobs": values})
    with pytest.raises(SampleError, match=r"no log-likelihoods for instruction 1, though .*--no-log-likelihoods"):
        ask(server, ["a"], api="completions")


def test_a_server_without_top_k_is_an_error_that_says_to_leave_it_out(server: Server) -> None:
    server.answer = lambda body: refused("Unrecognized request argument: top_k") if "top_k" in body else answered(body)
    with pytest.raises(SampleError, match=r"argument: top_k.* Leave out the decoding 'top-k'"):
        ask(server, ["a"], "sampling", "top-k")


def test_beams_are_refused_before_anything_is_asked(server: Server) -> None:
    endpoint = Endpoint(server.url, "small")
    for call in (endpoint.check, lambda *given: endpoint.sample(*given, seed=0)):
        with pytest.raises(SampleError, match=r"no beam search.*'beam' needs; leave it out, or take 'greedy'"):
            call(["a"], choose_decodings(["sampling", "beam"]))
    assert server.bodies == []


def test_an_error_names_the_instruction_and_drops_what_was_not_asked_yet(server: Server) -> None:
    server.answer = lambda body: refused("too long") if text_of(body) == "b" else answered(body)
    with pytest.raises(SampleError, match=r"instruction 2 \(sampling; 1 characters\): .*too long"):
        ask(server, ["a", "b", *"cdefghijklmnopqrstuvwxyz"], concurrent=1)
    assert len(server.bodies) < 10


@pytest.mark.slow
def test_an_interrupt_ends_the_command_while_a_server_hangs(server: Server, tmp_path: Path) -> None:
    come, over = threading.Event(), threading.Event()

    def answer(body: Body) -> Answer:
        come.set()
        over.wait(60)
        return answered(body)

    server.answer = answer
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "a"}\n')
    command = [sys.executable, "-m", "cappy_engine", "sample", "prompts.jsonl", "-o", "out.jsonl"]
    command += ["--endpoint", server.url, "--model", "m"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as running:
            assert come.wait(60)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate()
        assert server.running > 0
        assert (running.returncode, said) == (130, "cappy sample: interrupted\n")
    finally:
        over.set()


@pytest.mark.slow
def test_the_command_needs_neither_pytorch_nor_transformers(server: Server, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "a"}\n')
    command = ["sample", "prompts.jsonl", "-o", "out.jsonl", "--endpoint", server.url, "--model", "m"]
    done = run_without([*EXPORTER, "onnxruntime", "rouge_score", "matplotlib"], *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["samples"]) == 12


def test_a_prompt_that_a_server_refuses_is_an_error_that_says_how_to_go_on_without_it(server: Server) -> None:
    server.answer = lambda body: refused("maximum context length is 10 tokens")
    with pytest.raises(SampleError, match=r"is 10 tokens.* take its line out of PROMPTS"):
        ask(server, ["a"])


def test_no_server_is_an_error(server: Server) -> None:
    with pytest.raises(SampleError, match=r"http://127\.0\.0\.1:9/v1 failed on instruction 1 .*Connection error"):
        open_endpoint("http://127.0.0.1:9/v1", max_retries=0).sample(["a"], ENDPOINT_DECODINGS, seed=0)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "http://me:secret@host/v1",
        "http://host:abc/v1",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://me:secret@[::1/v1",
        "http://ho\x01st/v1",
    ],
)
def test_a_url_that_is_not_an_endpoints_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SampleError, match=r"is not an endpoint's URL; give http.*OPENAI_API_KEY") as caught:
        open_endpoint(url)
    assert str(caught.value).startswith(repr(url.rpartition("@")[2]))
    assert "secret" not in str(caught.value)
