"""Options of sampling that cannot be used are refused, by their name and value."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cappy_bench.candidates.sample_options import EndpointOptions, LLMOptions, SampleOptions, check_new_tokens
from cappy_engine.errors import SampleError


@pytest.mark.parametrize(
    ("options", "asked", "problem"),
    [
        (SampleOptions, {"seed": -1}, "seed must be at least 0, got -1"),
        (SampleOptions, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (LLMOptions, {"device": "tpu"}, "unknown device 'tpu'; choose from auto, cpu, cuda"),
        (LLMOptions, {"dtype": "float16"}, "unknown dtype 'float16'; choose from auto, float32, bfloat16"),
        (LLMOptions, {"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1, got 0"),
        (EndpointOptions, {"api": "responses"}, "unknown api 'responses'; choose from chat, completions"),
        (EndpointOptions, {"concurrent": 0}, "concurrent must be at least 1, got 0"),
        (EndpointOptions, {"max_choices": 0}, "max_choices must be at least 1, got 0"),
        (EndpointOptions, {"timeout_seconds": 0}, "timeout_seconds above 0, got 5 and 0"),
        (EndpointOptions, {"api": "completions", "uses_max_completion_tokens": True}, "'completions' has max_tokens"),
        (
            EndpointOptions,
            {"extra_body": {"min_p": 0, "temperature": 2, "n": 1}},
            "extra_body must not hold n, temperature: the command sends",
        ),
        (EndpointOptions, {"extra_body": {"max_completion_tokens": 9}}, "must not hold max_completion_tokens: the"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_refused(options: Any, asked: dict[str, Any], problem: str) -> None:
    with pytest.raises(SampleError, match=problem):
        options(**asked)


def test_a_limit_of_new_tokens_is_at_least_1() -> None:
    check_new_tokens(1)
    with pytest.raises(SampleError, match="max_new_tokens must be at least 1, got 0"):
        check_new_tokens(0)


def test_commands_read_the_options_without_a_heavy_package() -> None:
    code = "import sys, cappy_bench.candidates.sample_options; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "openai", "onnxruntime", "matplotlib"}
