"""A small random BERT in the form of all-MiniLM-L6-v2's folder, and a start of cappy-mini made of it."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from cappy_mini.start import make_start

TEXTS = ["the film was good.", "was the film good?", "a bad film was bad.", "good", "bad"] * 4


def make_minilm(folder: Path) -> Path:
    """Write the BERT to `folder`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good", "bad", ".", "?"]
    words += [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=384, num_hidden_layers=2, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_small_start(minilm: Path, out: Path) -> Path:
    """Write a starting checkpoint of two layers to the new folder `out`."""
    return make_start(minilm, TEXTS, out, vocab_size=280, layers=2)
