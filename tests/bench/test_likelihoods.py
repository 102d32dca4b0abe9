"""Log-likelihoods are those of a loop over tokens, and of a T5's own loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cappy_bench.candidates.likelihoods import log_likelihoods
from tests.support.small_llms import INSTRUCTIONS, KINDS, NEW, by_hand, token_by_token


def test_a_t5s_log_likelihood_is_its_loss_times_tokens(folders: dict[str, Path]) -> None:
    model, tokenizer = by_hand(folders["t5"], "t5")
    prompts = [tokenizer(text)["input_ids"] for text in INSTRUCTIONS]
    responses = [tokenizer(text)["input_ids"] for text in ("blue", "four dogs, three cats and one bird", "")]
    ours = log_likelihoods(model, prompts, responses, pad_id=0, decoder_start_id=0)
    for prompt, response, value in zip(prompts, responses, ours, strict=True):
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).loss
        assert value == pytest.approx(-float(loss) * len(response), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 40_000, 2**27], ids=["one by one", "some at a time", "all at once"])
def test_log_likelihoods_are_those_of_a_loop_over_tokens_however_padded(
    kind: str, most: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding tokens within a response count; so does one that is the end token."""
    model, _ = by_hand(folders[kind], kind)
    monkeypatch.setattr("cappy_bench.candidates.likelihoods.LOGITS_PER_PASS", most)
    prompts = [[9, 20, 33], [5], [40, 41, 42, 43, 44, 45, 46], [9, 20, 33], [7, 8]]
    responses = [[50, 0, 51, 1], [1], [60], [20] * NEW, [0, 0]]
    ours = log_likelihoods(model, prompts, responses, pad_id=0, decoder_start_id=0 if kind == "t5" else None)
    expected = [token_by_token(model, kind, *each) for each in zip(prompts, responses, strict=True)]
    assert ours == pytest.approx(expected, abs=2e-4)
