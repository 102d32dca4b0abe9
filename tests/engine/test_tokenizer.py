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

import json
import os
import re
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizer, BertTokenizerFast, RobertaTokenizer, RobertaTokenizerFast

from cappy_engine.errors import BundleError, InvalidPair
from cappy_engine.tokenizer import PairTokenizer, truncate_longest_first
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
LONG = "The quick brown fox, 3 dogs\nand a naïve 狐. " * 2326

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


@pytest.fixture(scope="module")
def tokenizer_file(checkpoint: Path) -> Path:
    return checkpoint / "tokenizer.json"


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


@pytest.mark.parametrize("text", [*NASTY, LONG], ids=lambda text: ascii(text[:20]))
def test_roberta_ids_of_nasty_texts_are_those_of_transformers(roberta: Family, text: str) -> None:
    pairs = [(text, "Yes"), ("Yes", text), (text, "")] + ([(text, text)] if text != LONG else [])
    assert_same_as(roberta.fast, roberta.engine, pairs)
    assert_same_as(roberta.slow, roberta.engine, pairs)


@settings(deadline=None, max_examples=150)
@given(pairs=st.lists(pairs_of_texts, min_size=1, max_size=4))
def test_roberta_ids_are_those_of_the_fast_tokenizer(roberta: Family, pairs: list[tuple[str, str]]) -> None:
    assert_same_as(roberta.fast, roberta.engine, pairs)


@settings(deadline=None, max_examples=150)
@given(pair=pairs_of_texts.filter(lambda pair: not any(map(has_separator_before_mask, pair))))
def test_roberta_ids_are_those_of_the_slow_tokenizer(roberta: Family, pair: tuple[str, str]) -> None:
    assert_same_as(roberta.slow, roberta.engine, [pair])


def test_roberta_keeps_a_control_character_before_mask_as_the_fast_tokenizer_does(roberta: Family) -> None:
    assert_same_as(roberta.fast, roberta.engine, [("a\x1c<mask>", "\x1f <mask>")])


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


@settings(deadline=None, max_examples=150)
@given(pairs=st.lists(pairs_of_texts, min_size=1, max_size=4))
def test_bert_ids_and_type_ids_are_those_of_the_fast_tokenizer(bert: Family, pairs: list[tuple[str, str]]) -> None:
    assert_same_as(bert.fast, bert.engine, pairs)


@settings(deadline=None, max_examples=150)
@given(pair=pairs_of_texts)
@example(pair=("never\u2e43seen", "\ufffe\U0002b820"))
def test_bert_ids_and_type_ids_are_those_of_the_slow_tokenizer(bert: Family, pair: tuple[str, str]) -> None:
    first, second = ("".join(char for char in text if has_old_characters(char)) for text in pair)
    assert_same_as(bert.slow, bert.engine, [(first, second)])


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
@settings(deadline=None, max_examples=200)
@given(first=words, second=words, max_length=st.integers(4, 60), kind=st.sampled_from(["roberta", "bert"]))
def test_truncation_is_that_of_the_tokenizers_library(
    tokenizer_file: Path, bert: Family, first: str, second: str, max_length: int, kind: str
) -> None:
    file = tokenizer_file if kind == "roberta" else bert.file
    library = Tokenizer.from_file(str(file))
    library.no_padding()
    library.enable_truncation(max_length=max_length, strategy="longest_first")
    expected = library.encode(first, second)
    found = PairTokenizer.from_file(file, max_length=max_length).encode([(first, second)])
    assert found.token_ids[0].tolist() == expected.ids
    assert found.type_ids[0].tolist() == expected.type_ids


@given(first=st.integers(0, 2000), second=st.integers(0, 2000), budget=st.integers(0, 1000))
def test_truncation_keeps_all_of_the_budget_and_cuts_the_longer_text_first(
    first: int, second: int, budget: int
) -> None:
    kept = truncate_longest_first(first, second, budget)
    assert kept[0] <= first
    assert kept[1] <= second
    assert sum(kept) == min(first + second, budget)
    if kept[0] < first:  # an odd token more goes to one of the two
        assert kept[0] >= kept[1] - 1
    if kept[1] < second:
        assert kept[1] >= kept[0] - 1


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.tuples(words, words), min_size=1, max_size=5), max_length=st.integers(4, 60))
def test_a_pair_is_flagged_as_truncated_where_transformers_would_cut_it(
    tokenizer_file: Path, lengths: list[tuple[str, str]], max_length: int
) -> None:
    uncut = RobertaTokenizerFast(tokenizer_file=str(tokenizer_file))(lengths, truncation=False)["input_ids"]
    found = PairTokenizer.from_file(tokenizer_file, max_length=max_length).encode(lengths)
    assert found.truncated.tolist() == [len(ids) > max_length for ids in uncut]
    assert found.lengths.tolist() == [min(len(ids), max_length) for ids in uncut]


def test_a_pair_of_exactly_the_maximum_length_is_not_truncated(tokenizer_file: Path) -> None:
    encoder = PairTokenizer.from_file(tokenizer_file, max_length=512)
    for words_in_second, is_truncated in ((254, False), (255, True)):
        found = encoder.encode([(" a" * 254, " a" * words_in_second)])
        assert found.lengths.tolist() == [512]
        assert found.truncated.tolist() == [is_truncated]


def test_truncation_and_padding_set_in_the_file_are_ignored(tokenizer_file: Path, tmp_path: Path) -> None:
    changed = Tokenizer.from_file(str(tokenizer_file))
    changed.enable_truncation(max_length=8)
    changed.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    changed.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is not None
    pairs = [("Is the sky blue at noon in the summer months?", "Yes"), ("a", "b")]
    expected = PairTokenizer.from_file(tokenizer_file, max_length=512).encode(pairs)
    found = PairTokenizer.from_file(tmp_path / "tokenizer.json", max_length=512).encode(pairs)
    assert [ids.tolist() for ids in found.token_ids] == [ids.tolist() for ids in expected.token_ids]
    assert not found.truncated.any()


# Work and memory


class CountingTokenizer:
    """The real tokenizer, which remembers what it was asked to tokenise."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._tokenizer = tokenizer

    def encode(self, sequence: str, pair: str | None = None, *, add_special_tokens: bool = True) -> Any:
        self.texts += [sequence] if pair is None else [sequence, pair]
        return self._tokenizer.encode(sequence, pair, add_special_tokens=add_special_tokens)

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> Any:
        self.texts += texts
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def test_each_distinct_text_of_a_call_is_tokenised_once(tokenizer_file: Path) -> None:
    counting = CountingTokenizer(Tokenizer.from_file(str(tokenizer_file)))
    encoder = PairTokenizer(counting, max_length=512)
    counting.texts.clear()
    pairs = [("Is the sky blue?", answer) for answer in ("Yes", "No", "Yes", "Is the sky blue?", "")]
    found = encoder.encode(pairs)
    assert sorted(counting.texts) == ["", "Is the sky blue?", "No", "Yes"]
    assert found.token_ids[0].tolist() == found.token_ids[2].tolist() != found.token_ids[1].tolist()


def test_no_pairs_give_no_ids(tokenizer_file: Path) -> None:
    found = PairTokenizer.from_file(tokenizer_file, max_length=512).encode([])
    assert (found.token_ids, found.type_ids) == ([], [])
    assert found.lengths.shape == (0,)
    assert found.lengths.dtype == np.int64
    assert found.truncated.shape == (0,)


def test_two_texts_of_a_million_characters_fit_in_little_memory(tokenizer_file: Path) -> None:
    # The library's own joining takes all the memory there is for this pair, hence a process with a limit.
    code = f"""
        import resource
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        from cappy_engine.tokenizer import PairTokenizer
        first, second = (("%s sky is blue. " % word * 70_000)[:1_000_000] for word in ("the", "a"))
        encoder = PairTokenizer.from_file(Path({str(tokenizer_file)!r}), max_length=512)
        found = encoder.encode([(first, second)])
        short = encoder.encode([(first[:5000], second[:5000])])
        assert found.truncated[0] and short.truncated[0]
        assert len(found.token_ids[0]) == 512
        assert found.token_ids[0].tolist() == short.token_ids[0].tolist()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    one_thread = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr


# What is refused


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (("fine", "lone \ud800 surrogate"), "surrogate"),
        (("\udfff", "fine"), "surrogate"),
        (("fine", None), "must be a str"),
        ((b"bytes", "fine"), "must be a str"),
        (("fine", 3.5), "must be a str"),
        (("one",), "tuple"),
        (("a", "b", "c"), "tuple"),
        ("ab", "tuple"),
        (None, "tuple"),
    ],
)
def test_what_is_no_pair_of_valid_strings_is_refused_with_its_index(
    tokenizer_file: Path, bad: Any, problem: str
) -> None:
    encoder = PairTokenizer.from_file(tokenizer_file, max_length=512)
    with pytest.raises(InvalidPair, match=problem) as caught:
        encoder.encode([("good", "pair"), ("good", "pair"), bad])
    assert caught.value.index == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"not json", b"\xff\xfe", b'{"model": {"type": "Magic"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        PairTokenizer.from_file(tmp_path / "tokenizer.json", max_length=512)


@pytest.mark.parametrize(
    "pair",
    [
        "<s> $B </s> $A </s>",
        "<s> $A $A </s> $B </s>",
        "<s> $A </s> $B $B </s>",
        "<s> $B $A $B </s>",
    ],
)
def test_a_tokenizer_that_joins_pairs_strangely_is_refused(tokenizer_file: Path, tmp_path: Path, pair: str) -> None:
    changed = Tokenizer.from_file(str(tokenizer_file))
    changed.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    changed.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="joins a pair"):
        PairTokenizer.from_file(tmp_path / "tokenizer.json", max_length=512)


@pytest.mark.parametrize("kept", ["A", "B"])
def test_a_tokenizer_that_drops_a_text_of_a_pair_is_refused(tokenizer_file: Path, tmp_path: Path, kept: str) -> None:
    # TemplateProcessing refuses to be built so; a file can still say it.
    changed = Tokenizer.from_file(str(tokenizer_file))
    changed.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    document = json.loads(changed.to_str())
    template = document["post_processor"]["pair"]
    document["post_processor"]["pair"] = [part for part in template if part.get("Sequence", {"id": kept})["id"] == kept]
    assert len(document["post_processor"]["pair"]) == len(template) - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"joins a pair|not a tokenizer"):
        PairTokenizer.from_file(tmp_path / "tokenizer.json", max_length=512)


@pytest.mark.parametrize("pair", ["$A $B", "<s>:1 $A:1 $B:0", "$A </s> $B:1", "<s> $A:0 </s>:0 $B:1 </s>:1"])
def test_any_template_of_prefix_middle_and_suffix_is_learnt(tokenizer_file: Path, tmp_path: Path, pair: str) -> None:
    changed = Tokenizer.from_file(str(tokenizer_file))
    changed.no_truncation()
    changed.post_processor = TemplateProcessing(single="$A", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)])
    changed.save(str(tmp_path / "tokenizer.json"))
    encoder = PairTokenizer.from_file(tmp_path / "tokenizer.json", max_length=512)
    for first, second in [("Is it?", "It is."), ("", "x"), ("x", ""), ("", ""), ("a", "a"), ("b", "a")]:
        found, expected = encoder.encode([(first, second)]), changed.encode(first, second)
        assert found.token_ids[0].tolist() == expected.ids
        assert found.type_ids[0].tolist() == expected.type_ids
