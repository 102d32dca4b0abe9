"""How the start of cappy-mini learns from MiniLM: the same words, read by two tokenizers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizerFast, RobertaForSequenceClassification, RobertaTokenizerFast

from cappy_mini.distil import Tokens, load_teacher, losses, main, read_pairs, tokenize, word_means
from tests.support.small_minilm import make_minilm, make_small_start


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_minilm(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="module")
def start(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_start(minilm, tmp_path_factory.mktemp("start") / "out")


@pytest.mark.slow
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
    main([*map(str, (start, minilm, tmp_path / "train.jsonl", out)), "--batch-size", "4"])
    pairs = [(f"{text} good", "good") for text in texts]
    student, teacher = RobertaTokenizerFast.from_pretrained(start), BertTokenizerFast(str(minilm / "vocab.txt"))
    batch = [(tokenize(student, pair, between=2), tokenize(teacher, pair, between=1)) for pair in pairs]
    before, after = (
        losses(RobertaForSequenceClassification.from_pretrained(folder).roberta, load_teacher(minilm), batch)
        for folder in (start, out)
    )
    assert all(new.item() < 0.9 * old.item() for new, old in zip(after, before, strict=True))
    assert (out / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()


def test_one_response_is_drawn_for_each_instruction_by_the_seed(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number // 4}", "response": f"r{number}"} for number in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(tmp_path / "train.jsonl", seed=1)
    assert pairs == read_pairs(tmp_path / "train.jsonl", seed=1) != read_pairs(tmp_path / "train.jsonl", seed=2)
    assert sorted(instruction for instruction, _ in pairs) == sorted(f"q{number}" for number in range(20))
    assert all(int(response[1:]) // 4 == int(instruction[1:]) for instruction, response in pairs)
