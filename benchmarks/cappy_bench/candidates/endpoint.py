"""Candidates from an LLM behind an OpenAI-compatible endpoint: OpenAI itself, vLLM, llama.cpp, Ollama and others.

Temperature and top-p are always sent. What a server does by itself stays: vLLM takes what is not sent from the model's
generation_config.json (start it with `--generation-config vllm`), llama.cpp has a top-k and a min-p of its own;
`extra_body` sends more. `top_k`, needed by the decoding "top-k", is not in OpenAI's protocol; vLLM and llama.cpp take
it. Log-likelihoods are the server's: whether they count the end token, and the temperature, is its affair.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai

from cappy_bench.candidates.decodings import Candidates, Decoding, Sample, derive_seed
from cappy_bench.candidates.sample_options import EndpointOptions, check_new_tokens
from cappy_bench.candidates.threads import run_all
from cappy_engine.checks import described
from cappy_engine.errors import SampleError
from cappy_engine.pairs import text_problem

GIVEN_UP = ("error", "abort", "cancelled", "timeout")
"""Reasons for the end of an answer that is not whole: the server, or one behind it, gave up."""

LONGEST_WAIT = 8.0
"""Seconds before a server is asked again."""

log = logging.getLogger(__name__)


class Endpoint:
    """An LLM behind `base_url`, where it has the name `model`; a `decodings.Sampler`.

    The key is that of the environment variable OPENAI_API_KEY.

        >>> Endpoint("http://localhost:8000/v1", "my-llm", EndpointOptions(max_choices=1)).name
        'my-llm'

    Raises SampleError for a URL that is not an endpoint's, and for `max_new_tokens` below 1.
    """

    def __init__(
        self, base_url: str, model: str, options: EndpointOptions | None = None, *, max_new_tokens: int = 128
    ) -> None:
        check_new_tokens(max_new_tokens)
        self._options = options = options or EndpointOptions()
        limit = "max_completion_tokens" if options.uses_max_completion_tokens else "max_tokens"
        self._fields = {"model": model, limit: max_new_tokens}
        self._extra = dict(options.extra_body or {})
        self._client = _client(base_url, options)
        self.name = model
        self.facts: Mapping[str, Any] = {
            "base_url": base_url,
            "model": model,
            "api": options.api,
            "max_new_tokens": max_new_tokens,
            "with_log_likelihoods": not options.without_log_likelihoods,
            "max_choices": options.max_choices,
            "extra_body": self._extra,
        }
        self.versions = {"openai": openai.__version__}

    def check(self, instructions: Sequence[str], decodings: Sequence[Decoding]) -> None:
        """Raise SampleError for a decoding with beams, which endpoints lack; the server judges the prompts."""
        for decoding in decodings:
            if decoding.num_beams > 1:
                raise SampleError(
                    f"an endpoint has no beam search, which the decoding {decoding.name!r} needs; leave it out, or "
                    "take 'greedy' instead"
                )

    def sample(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int, first: int = 1
    ) -> list[Candidates]:
        """Ask for candidates for each instruction, in order; a server may ignore the `seed` that is sent.

        Raises SampleError, where the first instruction has the number `first`; requests that were not sent are then
        dropped, and running ones are not waited for.
        """
        self.check(instructions, decodings)
        jobs = [
            functools.partial(self._ask, text, first + place - 1, decoding, (seed, place))
            for place, text in enumerate(instructions, start=1)
            for decoding in decodings
        ]
        found = run_all(jobs, self._options.concurrent)
        rows = [found[begin : begin + len(decodings)] for begin in range(0, len(found), len(decodings))]
        return [Candidates(tuple(one for each in row for one in each)) for row in rows]

    def _ask(self, instruction: str, number: int, decoding: Decoding, seeds: tuple[int, int]) -> list[Sample]:
        """All candidates of one decoding; a server may give fewer at once than it was asked for."""
        found: list[Sample] = []
        while len(found) < decoding.count:
            missing = decoding.count - len(found)
            fields = self._fields | {
                "n": min(missing, self._options.max_choices or missing),
                "temperature": decoding.temperature if decoding.is_sampled else 0.0,
                "top_p": decoding.top_p,
                "seed": derive_seed(*seeds, decoding.name, len(found)),
            }
            extra = self._extra | ({"top_k": decoding.top_k} if decoding.top_k is not None else {})
            try:
                answer, content = self._answer(instruction, fields, extra)
            except (openai.OpenAIError, ValueError) as error:
                raise SampleError(self._explained(error, instruction, number, decoding)) from error
            choices = _choices(answer)
            if not choices:
                why = "".join(f": {words}" for words in _error_in(answer)) or f"; it answered {_begin_of(content)}"
                raise SampleError(f"the endpoint gave no choice for instruction {number} ({decoding.name}){why}")
            found += [self._sample(choice, decoding, instruction, number) for choice in choices[:missing]]
        return found

    def _answer(self, instruction: str, fields: dict[str, Any], extra: dict[str, Any]) -> tuple[Any, bytes]:
        """Ask for an answer, and return it with its bytes.

        If it is not JSON, ask again, as after a lost connection. Raises ValueError if no answer is JSON.
        """
        retries, wait = 0, 0.5
        while True:
            response = self._request(instruction, fields, extra)
            content = bytes(response.http_response.content)
            try:
                return response.parse(), content
            except (ValueError, RecursionError) as error:
                if retries == self._options.max_retries:
                    raise ValueError(f"the answer is not JSON ({error}): {_begin_of(content)}") from error
            time.sleep(wait)
            retries, wait = retries + 1, min(2 * wait, LONGEST_WAIT)

    def _request(self, instruction: str, fields: dict[str, Any], extra: dict[str, Any]) -> Any:
        wants_likelihoods = not self._options.without_log_likelihoods
        if self._is_chat:
            likelihoods: dict[str, Any] = {"logprobs": True} if wants_likelihoods else {}
            messages: Any = [{"role": "user", "content": instruction}]
            create = self._client.chat.completions.with_raw_response.create
            return create(messages=messages, extra_body=extra, **fields, **likelihoods)
        likelihoods = {"logprobs": 1} if wants_likelihoods else {}  # llama.cpp takes 0 for none
        create_text = self._client.completions.with_raw_response.create
        return create_text(prompt=instruction, extra_body=extra, **fields, **likelihoods)

    def _sample(self, choice: Any, decoding: Decoding, instruction: str, number: int) -> Sample:
        problems = [*_error_in(choice), *([choice.finish_reason] if choice.finish_reason in GIVEN_UP else [])]
        if problems:
            raise SampleError(
                f"the endpoint did not finish its answer to instruction {number}: {problems[0]}; ask again once that "
                "is mended"
            )
        self._check_there(choice, number)
        message = getattr(choice, "message", None)
        found = getattr(message, "content", None) if self._is_chat else getattr(choice, "text", None)
        called = getattr(message, "tool_calls", None) or getattr(message, "function_call", None)
        text, refusal = _text(called or found, number), getattr(message, "refusal", None)
        if refusal or choice.finish_reason == "content_filter":
            why = f"{refusal or 'filtered'}"[:80]
            log.warning("an instruction was refused (%s): %s It begins with %.60r", decoding.name, why, instruction)
        values = None if self._options.without_log_likelihoods else self._values(choice, text, number)
        total = None if values is None else math.fsum(values)
        is_cut = choice.finish_reason in ("length", "content_filter")
        return Sample(text, decoding.name, total, None if values is None else len(values), is_cut)

    def _check_there(self, choice: Any, number: int) -> None:
        """Raise SampleError for a choice without the message, or the text, of its api: its candidate would be empty."""
        name, other, api = ("message", "text", "completions") if self._is_chat else ("text", "message", "chat")
        came, found = {*choice.model_fields_set, *(choice.model_extra or ())}, getattr(choice, name, None)
        if choice.finish_reason == "content_filter":  # which is warned of
            return
        if name not in came:
            what = f"has no {name}, but {', '.join(sorted(came))[:300]}"
        elif self._is_chat and not isinstance(found, openai.BaseModel):
            what = f"has a message of a wrong kind: {described(found)}"
        else:
            return
        hint = f"; is it one for --api {api}?" if other in came else ""
        raise SampleError(f"the endpoint's answer to instruction {number} {what}{hint}")

    def _values(self, choice: Any, text: str, number: int) -> list[float] | None:
        """log p of every token; None for a response that has none, such as a refusal."""
        found = getattr(choice.logprobs, "content" if self._is_chat else "token_logprobs", None)
        entries = found if isinstance(found, list) else []
        values: list[Any] = [getattr(entry, "logprob", None) for entry in entries] if self._is_chat else entries
        if not values and not text:
            return None
        if not values or not all(map(_is_log_p, values)):
            shown = "none" if not values else str(values)[:60]
            raise SampleError(
                f"the endpoint gave no log-likelihoods for instruction {number}, though asked to (logprobs: {shown}); "
                "do without them by --no-log-likelihoods"
            )
        return values

    @property
    def _is_chat(self) -> bool:
        return self._options.api == "chat"

    def _explained(self, error: Exception, instruction: str, number: int, decoding: Decoding) -> str:
        """What failed, with the server's own words and what may help."""
        message = str(error)[:500]
        hints = {
            "logprob": ""
            if self._options.without_log_likelihoods
            else " Do without log-likelihoods by --no-log-likelihoods.",
            "top_k": " Leave out the decoding 'top-k'." if decoding.top_k is not None else "",
            "max_completion_tokens": " Give the option for max_completion_tokens.",
        }
        hint = "".join(text for word, text in hints.items() if word in message)
        if isinstance(error, openai.BadRequestError) and not hint:
            hint = " If it is the prompt that it does not take, take its line out of PROMPTS."
        cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) and error.__cause__ else ""
        hint = f".{hint}" if hint and not f"{message}{cause}".endswith((".", "!", "?")) else hint
        return (
            f"{self.facts['base_url']} failed on instruction {number} ({decoding.name}; {len(instruction)} characters)"
            f": {message}{cause}{hint}"
        )


def _choices(answer: Any) -> list[Any]:
    """Take the choices of an answer; none if one of them is not an object."""
    found = getattr(answer, "choices", None)
    return found if isinstance(found, list) and all(isinstance(one, openai.BaseModel) for one in found) else []


def _error_in(answer: Any) -> list[str]:
    """Find the words of an error in an answer or a choice. The status may be 200 all the same."""
    found = getattr(answer, "error", None)
    return [str(found.get("message") or found if isinstance(found, dict) else found)[:500]] if found else []


def _begin_of(content: bytes) -> str:
    """Show the first characters of an answer."""
    return repr(content[:320].decode(errors="replace")[:80]) if content else "nothing"


def _is_log_p(value: Any) -> bool:
    """Tell whether a value can be the logarithm of a probability. Its last bits may be wrong."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < 1e-3


def _text(found: Any, number: int) -> str:
    """Take an answer's text, which may come in parts; none is empty. Raises SampleError for anything else."""
    parts = [found] if isinstance(found, str) else found or []
    texts = []
    for part in parts if isinstance(parts, list) else [parts]:
        is_part = isinstance(part, dict) and part.get("type") == "text"
        text = part["text"] if is_part and "text" in part else part
        problem = text_problem(text)
        if problem:
            raise SampleError(f"the endpoint's answer to instruction {number} is not a text: a part {problem}")
        texts.append(text)
    return "".join(texts)


def _client(base_url: str, options: EndpointOptions) -> openai.OpenAI:
    """Open the client. Raises SampleError, without a password, for a URL that is not an endpoint's."""
    try:
        url = urlsplit(base_url)
        is_endpoint = url.scheme in ("http", "https") and url.hostname and url.username is None
        is_endpoint = is_endpoint and not url.query and not url.fragment  # the client puts its path behind them
        if is_endpoint and url.port != 0:  # reading a port that is not a number raises ValueError
            return openai.OpenAI(
                base_url=base_url, api_key=_key(), max_retries=options.max_retries, timeout=options.timeout_seconds
            )
    except SampleError:
        raise
    except Exception as error:  # ValueError of urlsplit, or InvalidURL of the client's HTTP library, not a ValueError
        raise _not_an_endpoint(base_url) from error
    raise _not_an_endpoint(base_url)


def _key() -> str:
    """Read the key. Raises SampleError, without the key, where it cannot be sent: the HTTP library would print it."""
    key = os.environ.get("OPENAI_API_KEY") or "none"
    for place, character in enumerate(key, start=1):
        if not "!" <= character <= "~":
            raise SampleError(
                f"the key in OPENAI_API_KEY has {character!a} at character {place}, which cannot be sent; take it "
                "out (a line break often comes from the file that the key was read from)"
            )
    return key


def _not_an_endpoint(base_url: str) -> SampleError:
    shown = re.split("[?#]", base_url.rpartition("@")[2], maxsplit=1)[0]
    return SampleError(
        f"{shown!r} is not an endpoint's URL; give http(s)://HOST/v1 without a user name or a query, and the key in "
        "the environment variable OPENAI_API_KEY"
    )
