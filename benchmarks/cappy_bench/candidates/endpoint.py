"""Candidates from an LLM behind an OpenAI-compatible endpoint: OpenAI itself, vLLM, llama.cpp, Ollama and others.

Temperature and top-p are always sent. What a server does by itself stays: vLLM takes what is not sent from the model's
generation_config.json (start it with `--generation-config vllm`), llama.cpp has a top-k and a min-p of its own;
`extra_body` sends more. `top_k`, needed by the decoding "top-k", is no part of OpenAI's protocol; vLLM and llama.cpp
take it. Log-likelihoods are the server's: whether they count the end token, and the temperature, is its affair.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any
from urllib.parse import urlsplit

import openai

from cappy_bench.candidates.decodings import DECODINGS, Candidates, Decoding, Sample, derive_seed
from cappy_engine.errors import SampleError

ENDPOINT_DECODINGS = tuple(DECODINGS[name] for name in ("sampling", "temperature", "top-p"))
"""The paper's decodings that every endpoint has."""

APIS = ("chat", "completions")
SENT = frozenset(
    "model messages prompt n temperature top_p seed logprobs max_tokens max_completion_tokens stream".split()
)
"""Fields that the command decides on; `extra_body` would override them."""

log = logging.getLogger(__name__)


class Endpoint:
    """An LLM behind `base_url`; a `decodings.Sampler`.

    `api` "chat" sends an instruction as the user's message, "completions" as the prompt. The key is that of the
    environment variable OPENAI_API_KEY. At most `concurrent` requests run at once; one that fails for a while is
    repeated up to `max_retries` times. `max_choices` bounds the candidates of one request, for servers that give only
    one; `uses_max_completion_tokens` is for models that refuse `max_tokens` (OpenAI's newer ones).

    Raises SampleError for options that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api: str = "chat",
        max_new_tokens: int = 128,
        with_log_likelihoods: bool = True,
        concurrent: int = 8,
        max_retries: int = 5,
        timeout_seconds: float = 600.0,
        max_choices: int | None = None,
        uses_max_completion_tokens: bool = False,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        is_chat = api == "chat"
        if api not in APIS:
            raise SampleError(f"unknown api {api!r}; choose from {', '.join(APIS)}")
        if min(max_new_tokens, concurrent, max_choices or 1) < 1 or max_retries < 0 or not timeout_seconds > 0:
            raise SampleError("max_new_tokens, concurrent, max_choices and timeout_seconds must be above 0")
        if not is_chat and uses_max_completion_tokens:
            raise SampleError("the api 'completions' has max_tokens only; leave max_completion_tokens out")
        taken = sorted(SENT & set(extra_body or {}))
        if taken:
            raise SampleError(
                f"extra_body must not hold {', '.join(taken)}: the command sends these by its own options and decodings"
            )
        self._is_chat, self._has_likelihoods = is_chat, with_log_likelihoods
        self._concurrent, self._most = concurrent, max_choices
        limit = "max_completion_tokens" if uses_max_completion_tokens else "max_tokens"
        self._fields = {"model": model, limit: max_new_tokens}
        self._extra = dict(extra_body or {})
        self._client = _client(base_url, max_retries, timeout_seconds)
        self.name = model
        self.facts: Mapping[str, Any] = {
            "base_url": base_url,
            "model": model,
            "api": api,
            "max_new_tokens": max_new_tokens,
            "with_log_likelihoods": with_log_likelihoods,
            "max_choices": max_choices,
            "extra_body": self._extra,
        }
        self.versions = {"openai": openai.__version__}

    def check(self, instructions: Sequence[str], decodings: Sequence[Decoding]) -> None:
        """Raise SampleError for decodings that an endpoint does not have; its prompts are the server's to judge."""
        for decoding in decodings:
            if decoding.num_beams > 1:
                raise SampleError(
                    f"an endpoint has no beam search, which the decoding {decoding.name!r} needs; leave it out, or "
                    "take 'greedy' instead"
                )

    def sample(self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int) -> list[Candidates]:
        """Candidates for each instruction, in order. `seed` is sent, but whether it is heeded is the server's affair.

        Raises SampleError; requests that were not sent yet are then dropped, and those that run are not waited for.
        """
        self.check(instructions, decodings)
        jobs = [
            functools.partial(self._ask, text, place, decoding, seed)
            for place, text in enumerate(instructions, start=1)
            for decoding in decodings
        ]
        found = _run_all(jobs, self._concurrent)
        rows = [found[first : first + len(decodings)] for first in range(0, len(found), len(decodings))]
        return [Candidates(tuple(one for each in row for one in each)) for row in rows]

    def _ask(self, instruction: str, place: int, decoding: Decoding, seed: int) -> list[Sample]:
        """All candidates of one decoding; what a server gives at once may be fewer than asked for."""
        found: list[Sample] = []
        while len(found) < decoding.count:
            missing = decoding.count - len(found)
            fields = self._fields | {
                "n": min(missing, self._most or missing),
                "temperature": decoding.temperature if decoding.is_sampled else 0.0,
                "top_p": decoding.top_p,
                "seed": derive_seed(seed, place, decoding.name, len(found)),
            }
            extra = self._extra | ({"top_k": decoding.top_k} if decoding.top_k is not None else {})
            try:
                choices = self._choices(instruction, fields, extra)
            except (openai.OpenAIError, ValueError) as error:  # ValueError: an answer that is no JSON
                raise SampleError(self._explained(error, instruction, place, decoding)) from error
            if not choices:
                raise SampleError(f"the endpoint gave no choice for instruction {place} ({decoding.name})")
            found += [self._sample(choice, decoding, instruction, place) for choice in choices[:missing]]
        return found

    def _choices(self, instruction: str, fields: dict[str, Any], extra: dict[str, Any]) -> list[Any]:
        if self._is_chat:
            likelihoods: dict[str, Any] = {"logprobs": True} if self._has_likelihoods else {}
            messages: Any = [{"role": "user", "content": instruction}]
            answer: Any = self._client.chat.completions.create(
                messages=messages, extra_body=extra, **fields, **likelihoods
            )
        else:
            likelihoods = {"logprobs": 1} if self._has_likelihoods else {}  # llama.cpp takes 0 for none
            answer = self._client.completions.create(prompt=instruction, extra_body=extra, **fields, **likelihoods)
        choices = getattr(answer, "choices", None)
        return list(choices) if isinstance(choices, list) else []

    def _sample(self, choice: Any, decoding: Decoding, instruction: str, place: int) -> Sample:
        message = getattr(choice, "message", None)
        text = getattr(message, "content", None) if self._is_chat else getattr(choice, "text", None)
        text, refusal = text or "", getattr(message, "refusal", None)
        if refusal or choice.finish_reason == "content_filter":
            why = f"{refusal or 'filtered'}"[:80]
            log.warning("an instruction was refused (%s): %s It begins with %.60r", decoding.name, why, instruction)
        values = self._values(choice, text, place) if self._has_likelihoods else None
        total = None if values is None else math.fsum(values)
        is_cut = choice.finish_reason in ("length", "content_filter")
        return Sample(text, decoding.name, total, None if values is None else len(values), is_cut)

    def _values(self, choice: Any, text: str, place: int) -> list[float] | None:
        """log p of every token; None for a response that has none, such as a refusal."""
        logprobs = choice.logprobs
        if self._is_chat:
            values = [entry.logprob for entry in getattr(logprobs, "content", None) or []]
        else:
            values = list(getattr(logprobs, "token_logprobs", None) or [])
        if not values and not text:
            return None
        if not values or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            found = "none" if not values else str(values)[:60]
            raise SampleError(
                f"the endpoint gave no log-likelihoods for instruction {place}, though asked to (logprobs: {found}); "
                "do without them by --no-log-likelihoods"
            )
        return values

    def _explained(self, error: Exception, instruction: str, place: int, decoding: Decoding) -> str:
        message = str(error)[:500]
        hints = {
            "logprob": " Do without log-likelihoods by --no-log-likelihoods." if self._has_likelihoods else "",
            "top_k": " Leave out the decoding 'top-k'." if decoding.top_k is not None else "",
            "max_completion_tokens": " Give the option for max_completion_tokens.",
        }
        hint = "".join(text for word, text in hints.items() if word in message)
        if isinstance(error, openai.BadRequestError) and not hint:
            hint = " If it is the prompt that it does not take, take its line out of PROMPTS."
        cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) and error.__cause__ else ""
        return (
            f"{self.facts['base_url']} failed on instruction {place} ({decoding.name}; {len(instruction)} characters): "
            f"{message}{cause}{hint}"
        )


def _client(base_url: str, max_retries: int, timeout_seconds: float) -> openai.OpenAI:
    """Raises SampleError, without a password that the URL may hold, for what is no URL of an endpoint."""
    try:
        url = urlsplit(base_url)
        is_endpoint = url.scheme in ("http", "https") and url.hostname and url.username is None
        if is_endpoint and url.port != 0:  # reading the port raises ValueError for what is none
            key = os.environ.get("OPENAI_API_KEY") or "none"
            return openai.OpenAI(base_url=base_url, api_key=key, max_retries=max_retries, timeout=timeout_seconds)
    except Exception as error:  # ValueError of urlsplit, or an InvalidURL of the client's HTTP library, which is none
        raise _no_endpoint(base_url) from error
    raise _no_endpoint(base_url)


def _no_endpoint(base_url: str) -> SampleError:
    return SampleError(
        f"{base_url.rpartition('@')[2]!r} is no endpoint: needed is http(s)://HOST/v1 without a user name; a key goes "
        "into the environment variable OPENAI_API_KEY"
    )


def _run_all(jobs: Sequence[Callable[[], list[Sample]]], concurrent: int) -> list[list[Sample]]:
    """The results of `jobs`, in order, at most `concurrent` at once.

    At the first error, or an interrupt, jobs that have not begun are dropped and those that run are left behind: their
    threads are daemons, which a process does not wait for at its end, as it does for those of a ThreadPoolExecutor.
    """
    results: list[Future[list[Sample]]] = [Future() for _ in jobs]
    waiting = collections.deque(zip(jobs, results, strict=True))

    def work() -> None:
        while True:
            try:
                job, result = waiting.popleft()
            except IndexError:
                return
            try:
                result.set_result(job())
            except BaseException as error:  # whatever it is, who waits for the result must get it
                result.set_exception(error)

    for _ in range(min(concurrent, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    try:
        done, _ = wait(results, return_when=FIRST_EXCEPTION)
        for result in results:
            if result in done:
                result.result()  # raises
        return [result.result() for result in results]
    finally:
        waiting.clear()
