"""Token ids are transformers' own: the fast tokenizers' for every text, the slow ones' but for what is named here.

Where transformers' slow tokenizers differ from its fast ones, the engine follows the fast ones (Cappy was trained with
them). All of it was found by comparing every assigned code point, and 100,000 mixtures of odd ones:

- RoBERTa: Python counts U+001C to U+001F as white space and Rust does not, so the slow one swallows them before <mask>.
- BERT: the fast one knows the character classes of Unicode 8, the slow one those of the running Python. A letter, mark
  or punctuation of a later version is cut differently. (See `has_old_characters`.)
- BERT, with an odd number of tokens for the two texts (509 of 512): where both are cut and the second is not shorter,
  the slow one keeps one token more of the first text, the fast one of the second.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer, BertTokenizerFast, RobertaTokenizer, RobertaTokenizerFast

from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs

SPECIAL = ["<s>", "</s>", "<pad>", "<mask>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"]
NASTY = [
    "",
    " ",
    "\n",
    "\nName one fruit.",
    "  two  spaces  ",
    "tab\tand\r\nline ends\n\n",
    "NUL \x00 in the middle",
    "\x00",
    "controls \x01\x07\x1b[31m\x7f\x85",
    "عربي שלום right to left \u202eoverride\u202c",
    "e\u0301 n\u0303 combining, u\u0308\u0304\u0323 stacked, \u0301 alone",
    "Z̸̢͠a̵̝͝l̶̳͌g̷̱̈́o̶͚͘",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 zero-width joiners",
    "a literal </s> and <mask> and <pad> and <s>, and <unk>",
    "</s></s>",
    "   <mask>",
    "<mask><mask> <mask>",
    "[CLS] [SEP][MASK] [PAD] [UNK]",
    "中文 日本語 한국어 ภาษาไทย हिन्दी",
    "ﬁ ﬀ ½ ² Å Å İ ı ẞ ß ΟΔΟΣ ﷺ",
    "\ufeffBOM \u200b zero width \u00a0 no-break \u3000 ideographic",
    "don't we'LL I'M they've 'S 's",
    "http://example.org/?q=1&r=%20#x",
    "\U0010ffff \uffff \ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "1234567890" * 20,
]
LONG = "The quick brown fox, 3 dogs\nand a naïve 狐. " * 400

fragments = st.lists(st.one_of(st.sampled_from([*SPECIAL, *NASTY[:24]]), st.text(max_size=6)), max_size=8).map("".join)
texts = st.one_of(st.text(max_size=60), fragments)
pairs_of_texts = st.tuples(texts, texts)
words = st.integers(0, 40).map(lambda count: " a" * count)


@dataclass(frozen=True)
class Family:
    """The engine's tokenizer and transformers' two, from the same files."""

    file: Path
    engine: PairTokenizer
    fast: Any
    slow: Any


@pytest.fixture(scope="module", params=["trained", "genuine"])
def roberta(request: pytest.FixtureRequest) -> Family:
    """RoBERTa's tokenizer: the small byte-level BPE of the test checkpoint, and the genuine one."""
    folder: Path = request.getfixturevalue("checkpoint" if request.param == "trained" else "roberta_tokenizer_files")
    vocab, merges, file = (str(folder / name) for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    return Family(
        Path(file),
        PairTokenizer.from_file(Path(file), max_length=512),
        RobertaTokenizerFast(vocab_file=vocab, merges_file=merges, tokenizer_file=file, model_max_length=512),
        RobertaTokenizer(vocab, merges, model_max_length=512),
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """An uncased WordPiece of 2000 entries, trained on the parity pairs."""
    folder = tmp_path_factory.mktemp("bert")
    wordpiece = BertWordPieceTokenizer()
    parity_texts = [text for pair in default_pairs() for text in pair]
    wordpiece.train_from_iterator(parity_texts, vocab_size=2000, show_progress=False)
    wordpiece.save_model(str(folder))
    fast = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512)
    fast.save_pretrained(folder)
    return Family(
        folder / "tokenizer.json",
        PairTokenizer.from_file(folder / "tokenizer.json", max_length=512),
        fast,
        BertTokenizer(str(folder / "vocab.txt"), model_max_length=512),
    )


def assert_same_as(reference: Any, engine: PairTokenizer, pairs: Sequence[tuple[str, str]]) -> None:
    expected = reference(list(pairs), truncation=True, max_length=512, return_token_type_ids=True)
    found = engine.encode(pairs)
    assert [ids.tolist() for ids in found.token_ids] == expected["input_ids"]
    assert [ids.tolist() for ids in found.type_ids] == expected["token_type_ids"]
    assert found.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]


def has_separator_before_mask(text: str) -> bool:
    """Whether RoBERTa's slow tokenizer swallows a character here that the fast one keeps."""
    return re.search(r"[\x1c-\x1f]\s*<mask>", text) is not None


def has_old_characters(text: str) -> bool:
    """Whether all characters have been of the same class since Unicode 3.2, so that fast and slow BERT agree."""
    return all(unicodedata.category(char) == unicodedata.ucd_3_2_0.category(char) != "Cn" for char in text)


# RoBERTa


@pytest.mark.slow
@pytest.mark.parametrize("text", [*NASTY, LONG], ids=lambda text: ascii(text[:20]))
def test_roberta_ids_of_nasty_texts_are_those_of_transformers(roberta: Family, text: str) -> None:
    pairs = [(text, "Yes"), ("Yes", text), (text, "")] + ([(text, text)] if text != LONG else [])
    assert_same_as(roberta.fast, roberta.engine, pairs)
    assert_same_as(roberta.slow, roberta.engine, pairs)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(pairs=st.lists(pairs_of_texts, min_size=1, max_size=4))
def test_roberta_ids_are_those_of_the_fast_tokenizer(roberta: Family, pairs: list[tuple[str, str]]) -> None:
    assert_same_as(roberta.fast, roberta.engine, pairs)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(pair=pairs_of_texts.filter(lambda pair: not any(map(has_separator_before_mask, pair))))
def test_roberta_ids_are_those_of_the_slow_tokenizer(roberta: Family, pair: tuple[str, str]) -> None:
    assert_same_as(roberta.slow, roberta.engine, [pair])


def test_roberta_keeps_a_control_character_before_mask_as_the_fast_tokenizer_does(roberta: Family) -> None:
    assert_same_as(roberta.fast, roberta.engine, [("a\x1c<mask>", "\x1f <mask>")])


@pytest.mark.slow
def test_roberta_ids_of_the_parity_pairs_are_those_of_transformers(roberta: Family) -> None:
    pairs = default_pairs()
    assert_same_as(roberta.fast, roberta.engine, pairs)
    assert_same_as(roberta.slow, roberta.engine, pairs)


# BERT


@pytest.mark.parametrize("text", [*NASTY, LONG], ids=lambda text: ascii(text[:20]))
def test_bert_ids_and_type_ids_of_nasty_texts_are_those_of_transformers(bert: Family, text: str) -> None:
    pairs = [(text, "Yes"), ("Yes", text), (text, "")] + ([(text, text)] if text != LONG else [])
    assert_same_as(bert.fast, bert.engine, pairs)
    if has_old_characters(text):
        assert_same_as(bert.slow, bert.engine, pairs)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(pairs=st.lists(pairs_of_texts, min_size=1, max_size=4))
def test_bert_ids_and_type_ids_are_those_of_the_fast_tokenizer(bert: Family, pairs: list[tuple[str, str]]) -> None:
    assert_same_as(bert.fast, bert.engine, pairs)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(pair=pairs_of_texts)
@example(pair=("never\u2e43seen", "\ufffe\U0002b820"))
def test_bert_ids_and_type_ids_are_those_of_the_slow_tokenizer(bert: Family, pair: tuple[str, str]) -> None:
    first, second = ("".join(char for char in text if has_old_characters(char)) for text in pair)
    assert_same_as(bert.slow, bert.engine, [(first, second)])


@pytest.mark.slow
def test_bert_ids_of_the_parity_pairs_are_those_of_transformers(bert: Family) -> None:
    pairs = default_pairs()
    assert_same_as(bert.fast, bert.engine, pairs)
    old = [pair for pair in pairs if all(map(has_old_characters, pair))]
    lengths = [[len(bert.slow.tokenize(text)) for text in pair] for pair in old]
    same = [pair for pair, (first, second) in zip(old, lengths, strict=True) if not (254 < first <= second)]
    assert len(same) > 200
    assert_same_as(bert.slow, bert.engine, same)


# Truncation


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.tuples(words, words), min_size=1, max_size=5), max_length=st.integers(4, 60))
def test_a_pair_is_flagged_as_truncated_where_transformers_would_cut_it(
    checkpoint: Path, lengths: list[tuple[str, str]], max_length: int
) -> None:
    file = checkpoint / "tokenizer.json"
    uncut = RobertaTokenizerFast(tokenizer_file=str(file))(lengths, truncation=False)["input_ids"]
    found = PairTokenizer.from_file(file, max_length=max_length).encode(lengths)
    assert found.truncated.tolist() == [len(ids) > max_length for ids in uncut]
    assert found.lengths.tolist() == [min(len(ids), max_length) for ids in uncut]
