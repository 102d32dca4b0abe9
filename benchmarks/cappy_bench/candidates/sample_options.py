"""What is asked of an LLM and of a run that samples from it; `cappy sample` makes its options of these fields.

Imports neither torch nor openai: commands read it to say what they take. Every dataclass here raises SampleError, with
the name and the value, for what cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cappy_engine.checks import check_count
from cappy_engine.errors import SampleError
from cappy_engine.options import Asked, check_asked

API = Literal["chat", "completions"]
APIS = ("chat", "completions")
LLMDevice = Literal["auto", "cpu", "cuda"]
LLM_DEVICES = ("auto", "cpu", "cuda")
DType = Literal["auto", "float32", "bfloat16"]
DTYPES = ("auto", "float32", "bfloat16")

SENT = frozenset(
    "model messages prompt n temperature top_p seed logprobs max_tokens max_completion_tokens stream".split()
)
"""Fields of a request that the command decides on; `extra_body` would override them."""


def check_new_tokens(max_new_tokens: int) -> None:
    """Raise SampleError for a limit of new tokens below 1; every kind of LLM has this option.

    >>> check_new_tokens(128)
    """
    _refuse(check_count, "max_new_tokens", max_new_tokens)


def _refuse(check: Callable[..., object], *values: object) -> None:
    """Turn the ValueError of a check into a SampleError."""
    try:
        check(*values)
    except ValueError as error:
        raise SampleError(str(error)) from error


@dataclass(frozen=True)
class SampleOptions:
    """How a file of instructions is sampled.

    Candidates depend on `seed` and `batch_size`; `resume` goes on with a run that was stopped; `force` replaces the
    file, and what a stopped run left unless it goes on.

        >>> SampleOptions(seed=1, resume=True)
        SampleOptions(seed=1, batch_size=8, resume=True, force=False)
    """

    seed: Annotated[int, Asked("default: 0")] = 0
    batch_size: Annotated[int, Asked("instructions answered at once (default: 8)", least=1)] = 8
    resume: Annotated[bool, Asked("go on with a file that was stopped")] = False
    force: Annotated[bool, Asked("replace OUT if it exists")] = False

    def __post_init__(self) -> None:
        _refuse(check_asked, self)


@dataclass(frozen=True)
class LLMOptions:
    """How an LLM that runs here is loaded and asked.

    `device` "auto" is a GPU if there is one; several GPUs share a model. `dtype` "auto" is bfloat16 on GPUs and float32
    on the CPU. An instruction is the prompt, or, with `is_chat`, the user's message in the tokenizer's chat template.
    `max_prompt_tokens` cuts longer prompts on the right.

        >>> LLMOptions(dtype="bfloat16").device
        'auto'
    """

    revision: Annotated[str | None, Asked("hub revision: a branch, tag or commit")] = None
    device: Annotated[LLMDevice, Asked("default: auto, a GPU where there is one", choices=LLM_DEVICES)] = "auto"
    dtype: Annotated[DType, Asked("default: auto, bfloat16 on a GPU, float32 on the CPU", choices=DTYPES)] = "auto"
    max_prompt_tokens: Annotated[int | None, Asked("cut longer instructions (default: an error)", least=1)] = None
    is_chat: Annotated[bool, Asked("the instruction is the user's message of a chat", flag="--chat-template")] = False

    def __post_init__(self) -> None:
        _refuse(check_asked, self)


@dataclass(frozen=True)
class EndpointOptions:
    """How an LLM behind an OpenAI-compatible endpoint is asked.

    `api` "chat" sends an instruction as the user's message, "completions" as the prompt. At most `concurrent` requests
    run at once; one that fails for a while is repeated up to `max_retries` times. `max_choices` bounds the candidates
    of one request, for servers that give only one. `uses_max_completion_tokens` is for models that refuse `max_tokens`
    (OpenAI's newer ones). `extra_body` is sent with each request, and holds no field that the command decides on.

        >>> EndpointOptions(api="completions", extra_body={"top_k": -1}).concurrent
        8
    """

    api: Annotated[API, Asked("default: chat", choices=APIS)] = "chat"
    concurrent: Annotated[
        int,
        Asked(
            "requests at once, of those of one batch: --batch-size times the number of decodings (default: 8)",
            metavar="COUNT",
            least=1,
        ),
    ] = 8
    max_choices: Annotated[int | None, Asked("samples asked for in one request", metavar="COUNT", least=1)] = None
    uses_max_completion_tokens: Annotated[
        bool,
        Asked("send the limit by this name: OpenAI's newer models refuse max_tokens", flag="--max-completion-tokens"),
    ] = False
    extra_body: Annotated[
        Mapping[str, Any] | None,
        Asked(
            "more fields of each request, as in '{\"top_k\": -1}', which vLLM needs to sample from all tokens",
            metavar="JSON",
        ),
    ] = None
    without_log_likelihoods: Annotated[
        bool, Asked("for servers that do not give them", flag="--no-log-likelihoods")
    ] = False
    max_retries: int = 5
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        _refuse(check_asked, self)
        if self.max_retries < 0 or not self.timeout_seconds > 0:
            raise SampleError(
                f"max_retries must be at least 0 and timeout_seconds above 0, got {self.max_retries} and "
                f"{self.timeout_seconds}"
            )
        if self.api == "completions" and self.uses_max_completion_tokens:
            raise SampleError("the api 'completions' has max_tokens only; leave max_completion_tokens out")
        taken = sorted(SENT & set(self.extra_body or {}))
        if taken:
            raise SampleError(
                f"extra_body must not hold {', '.join(taken)}: the command sends these by its own options and decodings"
            )
