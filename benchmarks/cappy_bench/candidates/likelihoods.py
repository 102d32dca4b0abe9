"""Compute log-likelihoods of responses under an LLM: log p(response | prompt), one definition for all decodings.

It is the sum over the response's tokens, its end token included if it has one, of log p(token | prompt, tokens before)
under the model's own distribution: no temperature, no top-k. Knows token ids only, no texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

LOGITS_PER_PASS = 2**27
"""At most so many logits at a time: 512 MiB in float32, and as much again for their softmax."""

Ids = list[int]


def log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    *,
    pad_id: int,
    decoder_start_id: int | None,
) -> list[float]:
    """Compute the log-likelihood of each response to its prompt, in nats.

        >>> log_likelihoods(model, [[5, 6]], [[7, 1]], pad_id=0, decoder_start_id=0)
        [-3.2]

    No response may be empty. The softmax is float32's. A seq2seq model's decoder starts with `decoder_start_id`; None:
    the model is causal.
    """
    words = int(model.get_output_embeddings().weight.shape[0])
    sums: list[float] = []
    while len(sums) < len(prompts):
        count = _fitting(prompts[len(sums) :], responses[len(sums) :], words, is_causal=decoder_start_id is None)
        taken = slice(len(sums), len(sums) + count)
        with torch.inference_mode():
            if decoder_start_id is None:
                logits = _causal_logits(model, prompts[taken], responses[taken], pad_id)
            else:
                logits = _seq2seq_logits(model, prompts[taken], responses[taken], pad_id, decoder_start_id)
            targets, is_target = pad(responses[taken], pad_id, logits.device)
            log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, targets[:, :, None])[:, :, 0]
            sums += (log_p * is_target).sum(dim=1).tolist()
    return sums


def pad(
    rows: Sequence[Ids], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad to (tokens, mask), both (rows, longest) int64; the mask is 1 where there is a token.

    >>> pad([[5, 6], [7]], 0, torch.device("cpu"))[0].tolist()
    [[5, 6], [7, 0]]
    """
    longest = max(map(len, rows))

    def fill(row: Ids, blank: int) -> Ids:
        blanks = [blank] * (longest - len(row))
        return blanks + row if left else row + blanks

    tokens = torch.tensor([fill(row, pad_id) for row in rows], device=device)
    return tokens, torch.tensor([fill([1] * len(row), 0) for row in rows], device=device)


def _fitting(prompts: Sequence[Ids], responses: Sequence[Ids], words: int, *, is_causal: bool) -> int:
    """Count the first rows that can be computed at once; at least one."""
    longest, shortest_prompt = 0, len(prompts[0])
    for count, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1):
        longest = max(longest, len(response) + (len(prompt) if is_causal else 0))
        shortest_prompt = min(shortest_prompt, len(prompt))
        columns = longest - (shortest_prompt if is_causal else 0)
        if count > 1 and count * (columns + 1) * words > LOGITS_PER_PASS:
            return count - 1
    return len(prompts)


def _seq2seq_logits(
    model: PreTrainedModel, prompts: Sequence[Ids], responses: Sequence[Ids], pad_id: int, start_id: int
) -> torch.Tensor:
    """Compute (rows, longest response, words); the decoder's input is padded on the right, where it cannot look."""
    tokens, mask = pad(prompts, pad_id, model.device)
    before, _ = pad([[start_id, *response[:-1]] for response in responses], pad_id, model.device)
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=before).logits
    return logits


def _causal_logits(
    model: PreTrainedModel, prompts: Sequence[Ids], responses: Sequence[Ids], pad_id: int
) -> torch.Tensor:
    """Compute (rows, longest response, words); padded on the right, so that positions need no care.

    Logits of the prompts are not computed if the model can leave them out.
    """
    tokens, mask = pad(
        [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], pad_id, model.device
    )
    skipped = min(map(len, prompts)) - 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=tokens.shape[1] - skipped).logits
    else:
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, skipped:]
    first = torch.tensor([[len(prompt) - 1 - skipped] for prompt in prompts], device=logits.device)
    places = first + torch.arange(max(map(len, responses)), device=logits.device)
    rows = torch.arange(len(prompts), device=logits.device)[:, None]
    found: torch.Tensor = logits[rows, places.clamp(max=logits.shape[1] - 1)]
    return found
