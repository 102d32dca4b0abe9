"""Candidates from an LLM that runs here, by transformers' `generate`: seq2seq (T5 and its kin) or causal.

Decodings are exactly what they say: a checkpoint's own generation settings (a temperature, a repetition penalty) and
transformers' own top-k of 50 are not used. Log-likelihoods are those of `likelihoods.py`, whatever the decoding. Knows
nothing of files of instructions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cappy_bench.candidates.checkpoint import (
    load_llm,
    load_llm_config,
    load_llm_tokenizer,
    open_llm_checkpoint,
    special_ids,
)
from cappy_bench.candidates.decodings import Candidates, Decoding, Sample, derive_seed
from cappy_bench.candidates.likelihoods import log_likelihoods, pad
from cappy_bench.candidates.prompts import Prompt, PromptRules, encode_prompt, response_text
from cappy_bench.candidates.sample_options import LLMOptions, check_new_tokens
from cappy_engine.errors import CheckpointError, DeviceUnavailable, SampleError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
log = logging.getLogger(__name__)
Ids = list[int]


def open_llm(
    source: str | Path,
    options: LLMOptions | None = None,
    *,
    max_new_tokens: int = 128,
    say: Callable[[str], object] = log.info,
) -> LocalLLM:
    """Load an LLM, a local folder or a hub id, to sample from.

        >>> open_llm("google/flan-t5-small", LLMOptions(device="cpu")).name
        'google/flan-t5-small'

    Raises CheckpointError, DeviceUnavailable, and SampleError for options that do not fit the model.
    """
    check_new_tokens(max_new_tokens)
    options = options or LLMOptions()
    device = _choose_device(options.device)
    dtype = _choose_dtype(options.dtype, device)
    checkpoint = open_llm_checkpoint(source, revision=options.revision)
    tokenizer = load_llm_tokenizer(checkpoint)
    if options.is_chat and not tokenizer.chat_template:
        raise SampleError(f"the tokenizer of {checkpoint.name} has no chat template; take the instructions as they are")
    ids = special_ids(checkpoint, tokenizer)
    if checkpoint.is_seq2seq and not isinstance(ids.get("decoder_start_token_id"), int):
        raise CheckpointError(f"the config of {checkpoint.name} has no decoder_start_token_id")
    config = load_llm_config(checkpoint)
    room = _room(config, is_seq2seq=checkpoint.is_seq2seq, max_new_tokens=max_new_tokens)
    rules = PromptRules(is_chat=options.is_chat, max_tokens=options.max_prompt_tokens, room=room)
    _check_room(rules, checkpoint.name, max_new_tokens)
    identity = checkpoint.identity()
    model = load_llm(checkpoint, config, device=device, dtype=dtype)
    facts = {
        **identity,
        "kind": "seq2seq" if checkpoint.is_seq2seq else "causal",
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": options.max_prompt_tokens,
        "is_chat": options.is_chat,
    }
    say(f"{checkpoint.name}: {facts['kind']}, {model.num_parameters():,} parameters, {facts['dtype']} on {device}")
    return LocalLLM(model, tokenizer, ids, rules, facts)


class LocalLLM:
    """A loaded LLM; a `decodings.Sampler`. Make one with `open_llm`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Mapping[str, Any],
        rules: PromptRules,
        facts: Mapping[str, Any],
    ) -> None:
        self._model, self._tokenizer, self._ids, self._rules = model, tokenizer, ids, rules
        self._is_seq2seq, self._most = facts["kind"] == "seq2seq", int(facts["max_new_tokens"])
        self.name, self.facts = str(facts["model"]), facts
        ends = ids.get("eos_token_id", [])
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        gpu = {"gpu": torch.cuda.get_device_name()} if facts["device"] == "cuda" else {}
        self.versions = {"torch": str(torch.__version__), "transformers": str(transformers.__version__), **gpu}

    def check(self, instructions: Sequence[str], decodings: Sequence[Decoding]) -> None:
        """Raise SampleError for the first instruction that cannot be a prompt; no decoding is refused."""
        for place, text in enumerate(instructions, start=1):
            encode_prompt(self._tokenizer, text, self._rules, place=place)

    def sample(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int, first: int = 1
    ) -> list[Candidates]:
        """Generate candidates for all instructions together, once for each decoding.

        The same instructions in the same order, decodings and `seed` give the same candidates. Raises SampleError, also
        if memory runs out; the first instruction has the number `first` there.
        """
        prompts = self._prompts(instructions, first)
        found: list[list[Sample]] = [[] for _ in prompts]
        if not prompts:
            return []
        try:
            for decoding in decodings:
                responses = self._generate(prompts, decoding, derive_seed(seed, decoding.name))
                sources = [place for place in range(len(prompts)) for _ in range(decoding.count)]
                sums = self._log_likelihoods([prompts[place].tokens for place in sources], responses)
                self._check_finite(sums, [first + place for place in sources])
                for place, tokens, total in zip(sources, responses, sums, strict=True):
                    behind = [] if self._is_seq2seq else prompts[place].tokens
                    text = response_text(self._tokenizer, tokens, behind=behind)
                    is_cut = tokens[-1] not in self._ends
                    found[place].append(Sample(text, decoding.name, total, len(tokens), is_cut))
        except torch.OutOfMemoryError as error:
            raise SampleError(
                f"the GPU's memory does not hold {len(prompts)} instructions at a time: {error}; start anew with a "
                "smaller --batch-size"
            ) from error
        except (RuntimeError, ValueError, IndexError) as error:
            raise SampleError(f"{self.name} failed to generate: {error}") from error
        return [Candidates(tuple(samples), prompt.is_cut) for samples, prompt in zip(found, prompts, strict=True)]

    def _prompts(self, instructions: Sequence[str], first: int) -> list[Prompt]:
        numbered = enumerate(instructions, first)
        return [encode_prompt(self._tokenizer, text, self._rules, place=number) for number, text in numbered]

    def _generate(self, prompts: Sequence[Prompt], decoding: Decoding, seed: int) -> list[Ids]:
        """Generate `decoding.count` responses to each prompt: their tokens, up to the end token, if there is one."""
        rows = [prompt.tokens for prompt in prompts]
        tokens, mask = pad(rows, self._ids["pad_token_id"], self._model.device, left=not self._is_seq2seq)
        with torch.inference_mode(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            output = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=generation_config(decoding, self._ids, max_new_tokens=self._most),
                use_model_defaults=False,
            )
        start = 1 if self._is_seq2seq else tokens.shape[1]
        return [self._until_end(row) for row in output[:, start:].tolist()]

    def _until_end(self, tokens: Ids) -> Ids:
        """Cut behind the end token, where padding follows; a padding token before it was generated, and counts."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens) - 1)
        return tokens[: end + 1]

    def _log_likelihoods(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[float]:
        start = self._ids["decoder_start_token_id"] if self._is_seq2seq else None
        pad_id = self._ids["pad_token_id"]
        return log_likelihoods(self._model, prompts, responses, pad_id=pad_id, decoder_start_id=start)

    def _check_finite(self, sums: Sequence[float], numbers: Sequence[int]) -> None:
        for total, number in zip(sums, numbers, strict=True):
            if not math.isfinite(total):
                is_exact = self.facts["dtype"] == "float32"
                advice = "take its line out of PROMPTS" if is_exact else "start anew with --dtype float32"
                raise SampleError(f"{self.name} gives a log-likelihood of {total} for instruction {number}; {advice}")


def generation_config(decoding: Decoding, ids: Mapping[str, Any], *, max_new_tokens: int) -> GenerationConfig:
    """Translate a decoding into transformers' settings; `ids` are those of special tokens.

    >>> generation_config(PAPER[1], {"pad_token_id": 0}, max_new_tokens=8).num_return_sequences
    4
    """
    sampled = {"temperature": decoding.temperature, "top_k": decoding.top_k or 0, "top_p": decoding.top_p}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=decoding.is_sampled,
        num_beams=decoding.num_beams,
        num_return_sequences=decoding.count,
        **(sampled if decoding.is_sampled else {}),
        **ids,
    )


def _choose_device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable("PyTorch sees no CUDA device here; install a build of it for CUDA, or choose cpu")
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _choose_dtype(asked: str, device: str) -> torch.dtype:
    chosen = asked if asked != "auto" else "bfloat16" if device == "cuda" else "float32"
    if chosen == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceUnavailable("this GPU has no bfloat16; choose float32")
    return TORCH_DTYPES[chosen]


def _room(config: PretrainedConfig, *, is_seq2seq: bool, max_new_tokens: int) -> int | None:
    """Count the tokens of the longest prompt that the model has positions for; None: any."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    if is_seq2seq:  # encoder and decoder have positions of their own
        return positions if max_new_tokens <= positions else 0
    return positions - max_new_tokens


def _check_room(rules: PromptRules, name: str, max_new_tokens: int) -> None:
    """Raise SampleError if new tokens leave no room for a prompt of `rules.max_tokens`, or any."""
    if rules.room is not None and max(1, rules.max_tokens or 0) > rules.room:
        raise SampleError(
            f"{max_new_tokens} new tokens leave room for prompts of {max(0, rules.room)} tokens in {name}"
            + (f"; max_prompt_tokens is {rules.max_tokens}" if rules.max_tokens else "")
        )
