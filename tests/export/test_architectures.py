"""Encoders other than RoBERTa: what the README says is accepted is exported here, with parity, or refused by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    DistilBertTokenizerFast,
    PreTrainedTokenizerBase,
    XLMRobertaTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cappy_engine import Scorer
from cappy_engine.canary import read_canary
from cappy_engine.errors import CheckpointError, ExportError, ParityError
from cappy_export import ExportOptions, export
from cappy_export.checkpoints.checkpoint import open_checkpoint
from cappy_export.checkpoints.config import max_positions
from cappy_export.graphs.build import build_graph
from cappy_export.graphs.optimum import build_fused_graph
from cappy_export.proof.pairs import default_pairs
from tests.support.checkpoints import edit

TEXTS = [text for pair in default_pairs() for text in pair]


def wordpiece(folder: Path) -> PreTrainedTokenizerBase:
    """BERT's kind of tokenizer."""
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=3000, show_progress=False)
    trained.save_model(str(folder))
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512)


def distil_wordpiece(folder: Path) -> PreTrainedTokenizerBase:
    """DistilBERT's: the same, without token types."""
    wordpiece(folder)
    return DistilBertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512)


def unigram(folder: Path) -> PreTrainedTokenizerBase:
    """XLM-R's kind of tokenizer: SentencePiece unigram, `<s> A </s></s> B </s>` by a template."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = Counter("▁" + word for text in TEXTS for word in text.split()).most_common(2000)
    characters = sorted({character for text in TEXTS for character in text} | {"▁"})
    pieces = dict.fromkeys(special, 0.0) | dict.fromkeys(characters, -12.0) | {word: log(n / 1e5) for word, n in words}
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    path = folder / "unigram.json"
    tokenizer.save(str(path))
    loaded = XLMRobertaTokenizerFast(tokenizer_file=str(path), model_max_length=512)
    path.unlink()
    return loaded


def make(model_type: str, folder: Path, tokenizer_of: Callable[[Path], PreTrainedTokenizerBase], **shape: Any) -> Path:
    """A small random checkpoint of the architecture, with scores that vary."""
    folder.mkdir()
    tokenizer = tokenizer_of(folder)
    tokenizer.save_pretrained(folder)
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = shape if shape == DISTILBERT else {**usual, **shape}
    config = CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer),
        max_position_embeddings=514,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    return folder


DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
ACCEPTED: list[tuple[str, Callable[[Path], PreTrainedTokenizerBase], dict[str, Any]]] = [
    ("bert", wordpiece, {}),
    ("xlm-roberta", unigram, {}),
    ("distilbert", distil_wordpiece, DISTILBERT),
    ("electra", wordpiece, {"embedding_size": 32}),
    ("camembert", unigram, {}),
    ("albert", unigram, {"embedding_size": 32}),
    ("deberta-v2", unigram, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("deberta", unigram, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    ("modernbert", unigram, {}),
    ("megatron-bert", wordpiece, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tokenizer_of", "shape"), ACCEPTED, ids=[entry[0] for entry in ACCEPTED])
def test_an_encoder_is_exported_with_pytorchs_scores(
    tmp_path: Path, model_type: str, tokenizer_of: Callable[[Path], PreTrainedTokenizerBase], shape: dict[str, Any]
) -> None:
    checkpoint = make(model_type, tmp_path / "checkpoint", tokenizer_of, **shape)
    manifest = export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("fp32", "int8")))
    assert manifest["parity"]["pairs"]["score_std"] > 0.05

    pairs = default_pairs()[::9]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        expected = [
            model(**tokenizer([pair], truncation=True, max_length=512, return_tensors="pt")).logits[0, 0].item()
            for pair in pairs
        ]
    canary = read_canary(manifest, "cpu", "fp32")
    with Scorer.open(tmp_path / "bundle", precision="fp32") as scorer:
        np.testing.assert_allclose(scorer.score(pairs), expected, atol=1e-4)
        np.testing.assert_allclose(scorer.score_encoded(canary.pairs).scores, canary.scores, atol=canary.tolerance)


@pytest.mark.slow
def test_a_modernbert_of_transformers_5_is_exported_with_its_own_thetas(tmp_path: Path) -> None:
    """One theta for all layers, as mmBERT has it: read without `rope_parameters`, local layers would have 10000."""
    checkpoint = make("modernbert", tmp_path / "checkpoint", unigram, local_rope_theta=160000.0, local_attention=64)
    pairs = default_pairs()[::9]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.inference_mode():
        inputs = [tokenizer([pair], truncation=True, max_length=512, return_tensors="pt") for pair in pairs]
        expected = [model(**found).logits[0, 0].item() for found in inputs]

    def as_transformers_5_writes_it(config: dict[str, Any]) -> None:
        kinds = {"full_attention": config.pop("global_rope_theta"), "sliding_attention": config.pop("local_rope_theta")}
        del config["torch_dtype" if "torch_dtype" in config else "dtype"]
        config["rope_parameters"] = {
            name: {"rope_type": "default", "rope_theta": theta} for name, theta in kinds.items()
        }
        config.update(layer_types=list(kinds), transformers_version="5.1.0", dtype="float32")

    edit(checkpoint / "config.json", as_transformers_5_writes_it)
    export(checkpoint, tmp_path / "bundle")
    with Scorer.open(tmp_path / "bundle") as scorer:
        np.testing.assert_allclose(scorer.score(pairs), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "hidden"), [(2, 32), (4, 64)])
def test_bert_is_fused_completely(tmp_path: Path, heads: int, hidden: int) -> None:
    checkpoint = make("bert", tmp_path / "checkpoint", wordpiece, num_attention_heads=heads, hidden_size=hidden)
    _, facts = build_fused_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")
    fused = facts["fused"]
    assert (fused["Attention"], fused["SkipLayerNormalization"], fused["BiasGelu"]) == (2, 4, 2)


def test_bert_is_written_directly(tmp_path: Path) -> None:
    checkpoint = make("bert", tmp_path / "checkpoint", wordpiece)
    _, facts = build_graph(open_checkpoint(checkpoint), tmp_path / "model.onnx")
    assert facts == {"written_by": "cappy-export", "opset": 18, "unpadded": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "tokenizer_of", "changes"),
    [
        ("bert", wordpiece, {"hidden_act": "gelu_new"}),
        ("bert", wordpiece, {"position_embedding_type": "relative_key"}),
        ("electra", wordpiece, {"embedding_size": 32, "hidden_act": "gelu_new"}),
        ("deberta-v2", unigram, {"relative_attention": True, "pos_att_type": ["c2p"], "conv_kernel_size": 3}),
    ],
    ids=["gelu_new", "relative_key", "electra", "convolution"],
)
def test_what_is_not_written_directly_has_parity_by_optimum(
    tmp_path: Path, model_type: str, tokenizer_of: Callable[[Path], PreTrainedTokenizerBase], changes: dict[str, Any]
) -> None:
    checkpoint = make(model_type, tmp_path / "checkpoint", tokenizer_of, **changes)
    manifest = export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("fp32", "int8")))
    for precision in ("fp32", "int8"):
        assert manifest["graphs"][precision]["unpadded"] is False
    assert manifest["graphs"]["fp32"]["written_by"] == "optimum"


@pytest.mark.slow
def test_an_architecture_whose_scores_change_with_padding_is_caught_by_parity(tmp_path: Path) -> None:
    """ConvBERT's convolutions see padding, in PyTorch too: no batch of it can be right."""
    checkpoint = make("convbert", tmp_path / "checkpoint", wordpiece, embedding_size=32)
    with pytest.raises(ParityError):
        export(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_an_architecture_that_needs_more_than_a_pair_is_refused(tmp_path: Path) -> None:
    checkpoint = make("layoutlm", tmp_path / "checkpoint", wordpiece)
    with pytest.raises(ExportError, match="bbox"):
        export(checkpoint, tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "longest"), [("block_sparse", 112), ("original_full", 512)])
def test_bigbirds_pairs_end_where_its_scores_begin_to_depend_on_the_pairs_before(
    attention: str, longest: int, tmp_path: Path
) -> None:
    """Once it has met a short pair, PyTorch computes other scores for long ones, which no bundle could have both."""
    sparse = {"attention_type": attention, "block_size": 16, "num_random_blocks": 1}
    checkpoint = make("big_bird", tmp_path / "checkpoint", unigram, **sparse)
    assert export(checkpoint, tmp_path / "bundle")["model"]["max_length"] == longest
    pair = ("Is it so?", "It is. " * 90)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        expected = model(**tokenizer([pair], truncation=True, max_length=longest, return_tensors="pt")).logits
    with Scorer.open(tmp_path / "bundle") as scorer:
        np.testing.assert_allclose(scorer.score([pair]), expected[:, 0], atol=1e-4)


@pytest.mark.slow
def test_a_model_with_an_infinite_value_inside_is_exported_in_fp16(tmp_path: Path) -> None:
    """MPNet computes the logarithm of 0 for the distance of a token from itself, and does not use it."""
    checkpoint = make("mpnet", tmp_path / "checkpoint", unigram, relative_attention_num_buckets=32)
    limits = ("fp16.max_error=1",)  # weights are large here
    manifest = export(checkpoint, tmp_path / "bundle", ExportOptions(precisions=("fp16",), limits=limits))
    assert np.isfinite(manifest["graphs"]["fp16"]["largest_value"])


def test_longformer_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = make("longformer", tmp_path / "checkpoint", unigram, attention_window=16)
    with pytest.raises(CheckpointError, match="is a longformer, whose global attention the engine does not know"):
        export(checkpoint, tmp_path / "bundle")


def test_esm_counts_its_positions_from_the_padding() -> None:
    assert max_positions({"model_type": "esm", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
