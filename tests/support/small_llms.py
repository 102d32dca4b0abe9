"""Make small random LLMs with tokenizers of their own, and use them by ours and by hand.

A T5 has SentencePiece's spaces, a GPT-2 and a Llama have bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from cappy_bench.candidates.llm import LocalLLM, open_llm
from cappy_bench.candidates.sample_options import LLMOptions

KINDS = ("t5", "gpt2", "llama")
INSTRUCTIONS = ["Which colour has the sky?", "\nCount the dogs and the cats: there are ", "Ü"]
NEW = 8
"""New tokens at most, where a test says nothing else."""

LINES = [
    "Which colour has the sky? The sky is blue, and the sea is green.",
    "Count the dogs and the cats: there are four dogs, three cats and one bird.",
    "Überall grünt es schön, là-bas aussi. 日本語 \n\t and a second line.",
]
POSITIONS = 64
SPECIAL = ["<pad>", "</s>", "<unk>"]
CHAT = (
    "{% for message in messages %}{{ 'USER:' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'BOT:' }}{% endif %}"
)


def make_llm(folder: Path, kind: str, *, is_chat: bool = False) -> Path:
    """Write a random LLM of `kind` ("t5", "gpt2" or "llama") whose responses vary in length and mostly end."""
    tokenizer = _tokenizer(kind)
    if is_chat:
        tokenizer.chat_template = CHAT
    words = len(tokenizer)
    torch.manual_seed(5)
    if kind == "t5":
        t5 = T5Config(
            vocab_size=words, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        )  # fmt: skip
        model = AutoModelForSeq2SeqLM.from_config(t5)
    elif kind == "gpt2":
        gpt2 = GPT2Config(
            vocab_size=words, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(gpt2)
    else:
        llama = LlamaConfig(
            vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=POSITIONS, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(llama)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0.0, 0.4)
        model.lm_head.weight[1] *= 6  # the end comes more often
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def open_small(folder: Path, *, max_new_tokens: int = NEW, **options: Any) -> LocalLLM:
    return open_llm(folder, LLMOptions(**{"device": "cpu", **options}), max_new_tokens=max_new_tokens)


def by_hand(folder: Path, kind: str) -> tuple[Any, Any]:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def generated(model: Any, tokenizer: Any, kind: str, instruction: str, **options: Any) -> list[list[int]]:
    """What transformers' `generate` gives for one instruction: the tokens behind the prompt."""
    tokens = tokenizer(instruction, return_tensors="pt")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    rows = model.generate(**inputs, max_new_tokens=NEW, pad_token_id=pad, **options)
    return [row[1:] if kind == "t5" else row[tokens["input_ids"].shape[1] :] for row in rows.tolist()]


def token_by_token(model: Any, kind: str, prompt: list[int], response: list[int]) -> float:
    """log p of a response: one forward pass for each of its tokens, in double precision where it is summed."""
    total = 0.0
    for place, token in enumerate(response):
        with torch.no_grad():
            if kind == "t5":
                start = torch.tensor([[model.config.decoder_start_token_id, *response[:place]]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.tensor([[*prompt, *response[:place]]])).logits
        total += float(logits[0, -1].double().log_softmax(-1)[token])
    return total


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "t5":
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet: list[str] = []
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    if kind == "t5":
        backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    pad = {} if kind == "gpt2" else {"pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **pad)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the checkpoint of every kind; a test that changes one copies it."""
    return {kind: make_llm(tmp_path_factory.mktemp("llms") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def llms(folders: dict[str, Path]) -> dict[str, LocalLLM]:
    return {kind: open_small(folder) for kind, folder in folders.items()}
