"""Describe DeBERTa-v3's form of a checkpoint: config.json, and its kind of tokenizer."""

from __future__ import annotations

from collections import Counter
from math import log
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import DebertaV2TokenizerFast, PreTrainedTokenizerBase

from cappy_export.proof.pairs import default_pairs

LEARNT = 2000
"""Pieces of a vocabulary that are learnt from the package's own texts."""
ROWS_WITHOUT_TOKENS = 99
"""The published tables have 128,100 rows; tokens are 128,000 of SentencePiece's, and `[MASK]`."""


def config(**size: int) -> dict[str, Any]:
    """Make a config.json with every key of the published ones.

    >>> config(hidden_size=768, num_hidden_layers=12)["position_buckets"]
    256
    """
    return {
        "architectures": ["DebertaV2ForSequenceClassification"],
        "model_type": "deberta-v2",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02,
        "label2id": {"LABEL_0": 0},
        "layer_norm_eps": 1e-07,
        "max_position_embeddings": 512,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "pad_token_id": 0,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": size["hidden_size"],
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 256,
        "relative_attention": True,
        "share_att_key": True,
        "torch_dtype": "float16",
        "transformers_version": "4.38.1",
        "type_vocab_size": 0,
        "vocab_size": 128100,
        **size,
    }


def write_tokenizer(folder: Path, size: int | None, max_length: int) -> PreTrainedTokenizerBase:
    """Write DeBERTa-v3's kind of tokenizer, a SentencePiece unigram with `size` entries: `[CLS] A [SEP] B [SEP]`.

    Its normalizer has NFKC in place of SentencePiece's own table of characters (nmt_nfkc), which is in its files alone.

    >>> write_tokenizer(Path("made"), 128001, 512).mask_token_id
    128000
    """
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    texts = [text for pair in default_pairs() for text in pair]
    words = Counter("▁" + word for text in texts for word in text.split()).most_common(LEARNT)
    characters = sorted({character for text in texts for character in text} | {"▁"})
    pieces = dict.fromkeys(special, 0.0) | dict.fromkeys(characters, -12.0) | {word: log(n / 1e5) for word, n in words}
    filling = (size or 0) - len(pieces) - 1
    pieces |= {f"▁\ue000{number}\ue001": -20.0 for number in range(filling)}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace()
    unknown = AddedToken("[UNK]", normalized=True, special=True)
    tokenizer.add_special_tokens([*special[:3], unknown, "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return DebertaV2TokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=max_length)
