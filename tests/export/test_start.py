"""Where cappy-mini's training starts: a RoBERTa that begins with MiniLM's encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import RobertaForSequenceClassification, RobertaTokenizerFast

from cappy_mini.start import main, read_texts
from tests.support.small_minilm import TEXTS, make_minilm


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minilm(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="module")
def start(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    folder = tmp_path_factory.mktemp("start")
    rows = [{"instruction": f"{text} {place}", "response": "good"} for place, text in enumerate(TEXTS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(minilm), str(folder / "train.jsonl"), str(folder / "out"), "--vocab-size", "280", "--layers", "2"])
    return folder / "out"


def test_a_token_that_was_a_word_piece_starts_with_its_embedding(minilm: Path, start: Path) -> None:
    old = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"]
    new = load_file(start / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
    tokenizer = RobertaTokenizerFast.from_pretrained(start)
    vocabulary = (minilm / "vocab.txt").read_text().splitlines()
    [good] = tokenizer(" good", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(new[good], old[vocabulary.index("good")])
    torch.testing.assert_close(new[tokenizer.cls_token_id], old[vocabulary.index("[CLS]")])
    assert not new[tokenizer.pad_token_id].any()


def test_layers_are_carried_over_as_they_are(minilm: Path, start: Path) -> None:
    old, new = load_file(minilm / "model.safetensors"), load_file(start / "model.safetensors")
    names = [name for name in new if name.startswith("roberta.encoder.layer.")]
    assert len(names) == len([name for name in old if name.startswith("encoder.layer.")])
    assert all(torch.equal(new[name], old[name.removeprefix("roberta.")]) for name in names)


def test_it_is_a_checkpoint_with_one_label_and_positions_for_512_tokens(start: Path) -> None:
    model = RobertaForSequenceClassification.from_pretrained(start)
    ids = torch.full((1, 512), 5)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 1)


def test_each_text_is_read_once(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "response": "b"}, {"instruction": "b", "response": "c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_texts([tmp_path / "rows.jsonl"] * 2)) == ["a", "b", "c"]
