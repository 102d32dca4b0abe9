"""Describe families of checkpoints: for each a published one's config.json, weights' names and kind of tokenizer.

Configs have every key of the published files. Weights and vocabularies are made up, and of the published size where
that is asked for: pieces that no text holds fill the vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast, XLMRobertaTokenizerFast

from cappy_bench import family_deberta, family_ettin
from cappy_bench.family_deberta import LEARNT
from cappy_export.proof.pairs import default_pairs

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}

_COMMON = {
    "hidden_act": "gelu",
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "position_embedding_type": "absolute",
    "use_cache": True,
}


def write_wordpiece(folder: Path, size: int | None, max_length: int) -> PreTrainedTokenizerBase:
    """Write BERT's kind of tokenizer, uncased, with `size` entries: `[CLS] A [SEP] B [SEP]`, with token types.

    >>> write_wordpiece(Path("made"), 30522, 512).model_max_length
    512
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [normalizers.BertNormalizer().normalize_str(text) for text in _texts()]
    found = Counter(word for text in texts for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text))
    characters = sorted({character for word in found for character in word})
    pieces = [piece for character in characters for piece in (character, f"##{character}")]
    # Not learnt with tokenizers' trainer: of words that are as frequent it takes others each time.
    words = list(dict.fromkeys([*special, *pieces, *(word for word, _ in found.most_common(LEARNT))]))
    words += [f"[unused{number}]" for number in range((size or 0) - len(words))]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=max_length)


def write_unigram(folder: Path, size: int | None, max_length: int) -> PreTrainedTokenizerBase:
    """Write XLM-R's kind of tokenizer, a SentencePiece unigram with `size` entries: `<s> A </s></s> B </s>`.

    Its normalizer is NFKC; SentencePiece's own table of characters (nmt_nfkc) is in its files alone.

    >>> write_unigram(Path("made"), 250002, 8192).model_max_length
    8192
    """
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = Counter("▁" + word for text in _texts() for word in text.split()).most_common(LEARNT)
    characters = sorted({character for text in _texts() for character in text} | {"▁"})
    pieces = dict.fromkeys(special, 0.0) | dict.fromkeys(characters, -12.0) | {word: log(n / 1e5) for word, n in words}
    filling = (size or 0) - len(pieces) - 1
    pieces |= {f"▁\ue000{number}\ue001": -20.0 for number in range(filling)} | {"<mask>": 0.0}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*special, AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return XLMRobertaTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), model_max_length=max_length)


def write_bytes(folder: Path, size: int | None, max_length: int) -> PreTrainedTokenizerBase:
    """Write ModernBERT's kind of tokenizer, a byte-level BPE with `size` entries: `[CLS] A [SEP] B [SEP]`.

    >>> write_bytes(Path("made"), 50368, 8192).model_input_names
    ['input_ids', 'attention_mask']
    """
    special = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=LEARNT, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    filling = (size or 0) - len(vocabulary) - len(special)
    vocabulary |= {f"unused {number}": len(vocabulary) + number for number in range(filling)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([*special[:4], AddedToken("[MASK]", lstrip=True, special=True)])
    ends = [(token, tokenizer.token_to_id(token)) for token in special[:2]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict(zip(("cls", "sep", "pad", "unk", "mask"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in roles.items()},
    )


@dataclass(frozen=True)
class Published:
    """Describe a published checkpoint: its config.json, tokenizer and longest pair, and buffers among its weights.

    Its table of words has `rows_without_tokens` behind those of its tokens. One that `has_modules` has its head in
    modules of sentence-transformers (`family_ettin.py`).
    """

    config: Mapping[str, Any]
    write_tokenizer: Callable[[Path, int | None, int], PreTrainedTokenizerBase]
    max_length: int = 512
    buffers: tuple[str, ...] = ()
    rows_without_tokens: int = 0
    has_modules: bool = False

    def config_of(self, tokenizer: PreTrainedTokenizerBase, *, is_tiny: bool) -> dict[str, Any]:
        """Make the config.json of a checkpoint with this tokenizer, in the published size or tiny.

        >>> FAMILIES["ms-marco-MiniLM-L6-v2"].config_of(tokenizer, is_tiny=True)["hidden_size"]
        32
        """
        rows = max(tokenizer.get_vocab().values()) + 1 + self.rows_without_tokens
        made = {**self.config, **(TINY if is_tiny else {}), "vocab_size": rows}
        made |= {key: made["hidden_size"] for key in ("embedding_size", "pooler_hidden_size") if key in made}
        roles = {"pad_token_id": "pad", "bos_token_id": "cls", "cls_token_id": "cls", "eos_token_id": "sep"}
        for key, role in {**roles, "sep_token_id": "sep"}.items():
            if key in made:
                made[key] = getattr(tokenizer, f"{role}_token_id")
        return made


def _xlm_roberta(**size: int) -> dict[str, Any]:
    return {
        **_COMMON,
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "classifier_dropout": None,
        "layer_norm_eps": 1e-05,
        "output_past": True,
        "type_vocab_size": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.38.1",
        "vocab_size": 250002,
        **size,
    }


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

_MODERNBERT: dict[str, Any] = {
    "architectures": ["ModernBertForSequenceClassification"],
    "model_type": "modernbert",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "id2label": {"0": "LABEL_0"},
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "label2id": {"LABEL_0": 0},
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "reference_compile": False,
    "repad_logits_with_grad": False,
    "sep_token_id": 50282,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "torch_dtype": "float16",
    "transformers_version": "4.48.0.dev0",
    "vocab_size": 50368,
}
_17M = {"hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4, "intermediate_size": 384}
_68M = {"hidden_size": 512, "num_hidden_layers": 19, "num_attention_heads": 8, "intermediate_size": 768}

FAMILIES: Mapping[str, Published] = {
    "ms-marco-MiniLM-L6-v2": Published(
        {
            **_COMMON,
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            "gradient_checkpointing": False,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "num_attention_heads": 12,
            "num_hidden_layers": 6,
            "pad_token_id": 0,
            "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"},
            "transformers_version": "4.49.0",
            "type_vocab_size": 2,
            "vocab_size": 30522,
        },
        write_wordpiece,
        buffers=("bert.embeddings.position_ids",),
    ),
    "bge-reranker-base": Published(
        _xlm_roberta(**_BASE, max_position_embeddings=514),
        write_unigram,
        buffers=("roberta.embeddings.position_ids",),
    ),
    "bge-reranker-large": Published(_xlm_roberta(**_LARGE, max_position_embeddings=514), write_unigram),
    "bge-reranker-v2-m3": Published(_xlm_roberta(**_LARGE, max_position_embeddings=8194), write_unigram, 8192),
    "gte-reranker-modernbert-base": Published(_MODERNBERT, write_bytes, 8192),
    "ettin-reranker-17m-v1": Published(family_ettin.config(_MODERNBERT, _17M), write_bytes, 7999, has_modules=True),
    "ettin-reranker-68m-v1": Published(family_ettin.config(_MODERNBERT, _68M), write_bytes, 7999, has_modules=True),
    "ms-marco-electra-base": Published(
        {
            **_COMMON,
            "architectures": ["ElectraForSequenceClassification"],
            "model_type": "electra",
            "embedding_size": 768,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"},
            "summary_activation": "gelu",
            "summary_last_dropout": 0.1,
            "summary_type": "first",
            "summary_use_proj": True,
            "transformers_version": "4.49.0",
            "type_vocab_size": 2,
            "vocab_size": 30522,
            **_BASE,
        },
        write_wordpiece,
        buffers=("electra.embeddings.position_ids",),
    ),
    "mxbai-rerank-base-v1": Published(
        family_deberta.config(**_BASE),
        family_deberta.write_tokenizer,
        rows_without_tokens=family_deberta.ROWS_WITHOUT_TOKENS,
    ),
    "reward-model-deberta-v3-large-v2": Published(
        {**family_deberta.config(**_LARGE), "torch_dtype": "float32", "transformers_version": "4.26.0.dev0"},
        family_deberta.write_tokenizer,
        buffers=("deberta.embeddings.position_ids",),
        rows_without_tokens=family_deberta.ROWS_WITHOUT_TOKENS,
    ),
}
"""The checkpoints whose form is known, by the last part of their hub ids."""


def _texts() -> list[str]:
    return [text for pair in default_pairs() for text in pair]
