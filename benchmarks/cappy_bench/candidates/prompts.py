"""Turn instructions into the tokens that an LLM reads, and its tokens into text.

An instruction is taken as it is, or as the user's message of a chat. A prompt that is too long is refused, or cut on
the right if a limit was given. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cappy_engine.errors import SampleError

TAIL_TOKENS = 8
"""A response is decoded behind so many of the prompt's last tokens."""


@dataclass(frozen=True)
class Prompt:
    """The `tokens` of an instruction; `is_cut`: some of its text is left out."""

    tokens: list[int]
    is_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class PromptRules:
    """`max_tokens` cuts longer prompts on the right; without it, one longer than `room` is an error. None: no limit."""

    is_chat: bool
    max_tokens: int | None
    room: int | None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str, rules: PromptRules, *, place: int) -> Prompt:
    """Encode one instruction, with the special tokens that the tokenizer or the chat template adds.

        >>> encode_prompt(tokenizer, "Add 2 and 3.", PromptRules(is_chat=False, max_tokens=None, room=512), place=1)
        Prompt(tokens=[2334, 204, 11, 220, 5, 1], is_cut=False)

    Raises SampleError, with the instruction's `place`, for a prompt without tokens or one that is too long.
    """
    tokens = _chat(tokenizer, instruction) if rules.is_chat else _plain(tokenizer, instruction)
    if not tokens:
        raise SampleError(
            f"instruction {place} gives no tokens, so there is nothing to go on from: {instruction!r:.60}"
        )
    if rules.max_tokens is not None and len(tokens) > rules.max_tokens:
        shorten = _shorten_chat if rules.is_chat else _shorten_plain
        return Prompt(shorten(tokenizer, instruction, rules.max_tokens, len(tokens), place), is_cut=True)
    if rules.room is not None and len(tokens) > rules.room:
        raise SampleError(
            f"instruction {place} has {len(tokens)} tokens and the model takes {rules.room} beside the new ones; leave "
            "it out, ask for fewer new tokens, or cut long prompts on the right with max_prompt_tokens"
        )
    return Prompt(tokens)


def response_text(tokenizer: PreTrainedTokenizerBase, response: Sequence[int], *, behind: Sequence[int]) -> str:
    """Decode a response to the prompt `behind` (empty for seq2seq models), without special tokens.

        >>> response_text(tokenizer, [7692, 1], behind=[])
        'Five'

    Nothing else is taken off or tidied up. SentencePiece drops the first space of a text. A causal model's response
    goes on from the prompt, so it is decoded behind the prompt's last tokens, and keeps that space as with byte-level
    BPE.
    """
    tail = list(behind[-TAIL_TOKENS:])
    before, whole = _decode(tokenizer, tail), _decode(tokenizer, [*tail, *response])
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, response)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int | None = None) -> list[int]:
    is_cut = max_length is not None
    return list(tokenizer(text, verbose=False, truncation=is_cut, max_length=max_length)["input_ids"])


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    try:
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template is a program, which can fail in any way
        raise SampleError(
            f"the tokenizer's chat template fails on the instruction {text!r:.60}: {error}; take the instructions as "
            "they are, without a chat template"
        ) from error
    return list(tokens)


def _shorten_plain(tokenizer: PreTrainedTokenizerBase, text: str, most: int, count: int, place: int) -> list[int]:
    """The tokenizer's own truncation, which keeps the special tokens."""
    if most <= tokenizer.num_special_tokens_to_add():
        raise SampleError(f"max_prompt_tokens {most} leaves no text of instruction {place} ({count} tokens)")
    return _plain(tokenizer, text, max_length=most)


def _shorten_chat(tokenizer: PreTrainedTokenizerBase, text: str, most: int, count: int, place: int) -> list[int]:
    """Cut the message, not the template around it: the end of the user's turn must stay."""
    if not tokenizer.is_fast:
        raise SampleError(f"instruction {place} has {count} tokens; cutting a chat to {most} needs a fast tokenizer")
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    for kept in range(min(len(spans) - 1, len(spans) - (count - most)), 0, -1):
        tokens = _chat(tokenizer, text[: spans[kept][0]])
        if len(tokens) <= most:
            return tokens
    raise SampleError(f"max_prompt_tokens {most} leaves no text of instruction {place} ({count} tokens)")
