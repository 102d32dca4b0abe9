"""Texts become tokens once each, pairs fit the model, and a file that joins pairs in an unknown way is refused.

That the tokens are transformers' own is in tests/contracts/test_tokenizers.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing

from cappy_engine.errors import BundleError, InvalidPair
from cappy_engine.pair_template import truncate_longest_first
from cappy_engine.tokenizer import PairTokenizer
from tests.support.places import parity_pairs

words = st.integers(0, 40).map(lambda count: " a" * count)


@pytest.fixture(scope="module")
def tokenizer_file(bundle: Path) -> Path:
    return bundle / "tokenizer.json"


@pytest.fixture(scope="module")
def bert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an uncased WordPiece of 500 entries, with the token types of BERT."""
    wordpiece = BertWordPieceTokenizer()
    texts = [text for pair in parity_pairs() for text in pair]
    wordpiece.train_from_iterator(texts, vocab_size=500, show_progress=False)
    wordpiece.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, wordpiece.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    file = tmp_path_factory.mktemp("bert") / "tokenizer.json"
    wordpiece.save(str(file))
    return file


# Truncation


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(first=words, second=words, max_length=st.integers(4, 60), kind=st.sampled_from(["roberta", "bert"]))
def test_truncation_is_that_of_the_tokenizers_library(
    tokenizer_file: Path, bert_file: Path, first: str, second: str, max_length: int, kind: str
) -> None:
    library = Tokenizer.from_file(str(tokenizer_file if kind == "roberta" else bert_file))
    engine = PairTokenizer(Tokenizer.from_str(library.to_str()), max_length=max_length)
    library.enable_truncation(max_length=max_length, strategy="longest_first")
    expected = library.encode(first, second)
    found = engine.encode([(first, second)])
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


@pytest.mark.slow
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


# Processes


FORK = """
import os, signal, sys
from pathlib import Path
from cappy_engine.tokenizer import PairTokenizer

def tokens():
    tokenizer = PairTokenizer.from_file(Path(sys.argv[1]), max_length=512)
    return int(tokenizer.encode([("Is the sky blue?", f"Yes {number}") for number in range(50)]).lengths.sum())

expected = tokens() if sys.argv[2] == "used" else 0  # that tokenizer is gone
if os.fork() == 0:
    signal.alarm(20)
    found = tokens()
    threads = len(os.listdir("/proc/self/task"))
    print(found == expected, "one thread" if threads == 1 else "threads", flush=True)
    os._exit(0)
print(os.wait()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("use", "told"), [("used", "True one thread\n0\n"), ("unused", "False threads\n0\n")])
def test_a_child_tokenises_whether_its_parents_tokenizer_lives_or_not(
    tokenizer_file: Path, use: str, told: str
) -> None:
    """The library's threads are not in the child, whoever used them. Where nobody did, the child has its own."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    python = [sys.executable, "-W", "ignore:This process:DeprecationWarning"]  # Python 3.12 warns of forks with threads
    done = subprocess.run(
        [*python, "-c", FORK, str(tokenizer_file), use], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.stdout, done.stderr) == (told, "")


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


def test_special_tokens_alone_must_fit_the_model(tokenizer_file: Path) -> None:
    assert PairTokenizer.from_file(tokenizer_file, max_length=4).encode([("a", "b")]).lengths.tolist() == [4]
    with pytest.raises(BundleError, match="puts 4 special tokens around a pair, and the model takes 3 tokens"):
        PairTokenizer.from_file(tokenizer_file, max_length=3)
