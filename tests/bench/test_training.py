"""The scripts that make cappy-mini: where it starts, which examples a stage sees, how accuracy is counted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    RobertaForSequenceClassification,
    RobertaTokenizerFast,
)

from cappy_bench.quality.held_out import accuracies, chances
from cappy_mini.distil import Tokens, load_teacher, losses, tokenize, word_means
from cappy_mini.distil import main as distil_main
from cappy_mini.mixture import EASY, STAGES, select
from cappy_mini.start import make_start


def test_a_mixture_takes_whole_groups_and_about_the_fraction_asked_for() -> None:
    rows = [
        {"task": task, "group": f"{number}", "response": candidate}
        for task in ("trec", "piqa", "unknown")
        for number in range(400)
        for candidate in "ab"
    ]
    lines = [json.dumps(row) for row in rows]
    chosen = [json.loads(line) for line in select(lines, {"trec": 0.5, "piqa": 1.0}, seed=0)]
    counts = {task: sum(row["task"] == task for row in chosen) for task in ("trec", "piqa", "unknown")}
    assert counts["piqa"] == 800
    assert counts["unknown"] == 0
    assert 300 < counts["trec"] < 500
    groups = [row["group"] for row in chosen if row["task"] == "trec"]
    assert all(groups.count(group) == 2 for group in set(groups))
    assert [json.dumps(row) for row in chosen] == list(select(lines, {"trec": 0.5, "piqa": 1.0}, seed=0))
    assert set(STAGES[1]) == set(EASY)


def test_accuracy_counts_groups_by_their_best_label() -> None:
    rows = [
        {"task": "t", "group": "1", "label": 1.0},
        {"task": "t", "group": "1", "label": 0.0},
        {"task": "t", "group": "2", "label": 0.0},
        {"task": "t", "group": "2", "label": 1.0},
        {"task": "t", "group": "2", "label": 1.0},
        {"task": "t", "group": "3", "label": 0.7},
        {"task": "u", "group": "1", "label": 0.2},
        {"task": "u", "group": "1", "label": 0.9},
    ]
    scores = np.array([0.5, 0.5, 0.9, 0.1, 0.2, 0.3, 0.1, 0.2], dtype=np.float32)
    assert accuracies(rows, scores) == {"t": 0.5, "u": 1.0}
    assert chances(rows) == {"t": pytest.approx((1 / 2 + 2 / 3) / 2), "u": 0.5}


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in the form of all-MiniLM-L6-v2's folder, with random weights."""
    folder = tmp_path_factory.mktemp("minilm")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good", "bad", ".", "?", *letters]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{letter}" for letter in letters)]))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words) + 26, hidden_size=384, num_hidden_layers=2, num_attention_heads=12,
                        intermediate_size=1536)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["the film was good.", "was the film good?", "a bad film was bad.", "good", "bad"] * 4
    return make_start(minilm, texts, tmp_path_factory.mktemp("start") / "out", vocab_size=280, layers=2)


def test_a_token_that_was_a_word_piece_starts_with_its_embedding(minilm: Path, start: Path) -> None:
    old = load_file(minilm / "model.safetensors")["embeddings.word_embeddings.weight"]
    new = load_file(start / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
    tokenizer = RobertaTokenizerFast.from_pretrained(start)
    vocabulary = (minilm / "vocab.txt").read_text().splitlines()
    [good] = tokenizer(" good", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(new[good], old[vocabulary.index("good")])
    torch.testing.assert_close(new[tokenizer.cls_token_id], old[vocabulary.index("[CLS]")])
    assert not new[tokenizer.pad_token_id].any()


@given(st.lists(st.sampled_from(["the film", "was bad.", "Žlutý", "  ", "\n", "naïve", "x" * 30, "好", "?"])))
def test_both_tokenizers_read_the_same_words(minilm: Path, start: Path, parts: list[str]) -> None:
    """The text of the tokens with one number is one word of the pair, for either tokenizer."""
    pair = (" ".join(parts), "was good")
    mine = tokenize(RobertaTokenizerFast.from_pretrained(start), pair, between=2)
    theirs = tokenize(BertTokenizerFast(str(minilm / "vocab.txt")), pair, between=1)
    words = [word for text in pair for word in text.split()]
    assert {word for word in mine.words if word >= 0} == set(range(len(words)))
    assert {word for word in theirs.words if word >= 0} == set(range(len(words)))
    expected = RobertaTokenizerFast.from_pretrained(start)([pair])["input_ids"][0]
    assert mine.ids == expected
    assert theirs.ids == BertTokenizerFast(str(minilm / "vocab.txt"))([pair])["input_ids"][0]


def test_a_word_is_the_mean_of_its_tokens() -> None:
    hidden = torch.tensor([[[9.0], [1.0], [3.0], [5.0]], [[9.0], [7.0], [8.0], [8.0]]])
    batch = [Tokens([0, 5, 6, 7], [-1, 0, 0, 1]), Tokens([0, 5], [-1, 1])]
    means, have = word_means(hidden, batch, 2)
    assert means.flatten().tolist() == [2.0, 5.0, 0.0, 7.0]
    assert have.tolist() == [True, True, False, True]


@pytest.mark.slow
def test_distillation_brings_the_student_nearer_to_its_teacher(minilm: Path, start: Path, tmp_path: Path) -> None:
    texts = ["the film was good.", "was the film bad?", "the film was bad. was good?", "a good film"]
    ends = [" ".join(words) for words in itertools.product(("the", "good", "bad", "film"), repeat=3)]
    rows = [{"instruction": f"{text} {end}", "response": end} for text in texts for end in ends]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    distil_main([*map(str, (start, minilm, tmp_path / "train.jsonl", out)), "--batch-size", "4"])
    pairs = [(f"{text} good", "good") for text in texts]
    student, teacher = RobertaTokenizerFast.from_pretrained(start), BertTokenizerFast(str(minilm / "vocab.txt"))
    batch = [(tokenize(student, pair, between=2), tokenize(teacher, pair, between=1)) for pair in pairs]
    before, after = (
        losses(RobertaForSequenceClassification.from_pretrained(folder).roberta, load_teacher(minilm), batch)
        for folder in (start, out)
    )
    assert all(new.item() < 0.9 * old.item() for new, old in zip(after, before, strict=True))
    assert (out / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
