"""What a scorer is asked for is what it was told, or an error: bundles, options, pairs that are too long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cappy_engine import Scorer, ScorerOptions
from cappy_engine.batching import EncodedPairs
from cappy_engine.bundle import EMBEDDED, open_bundle
from cappy_engine.errors import BundleError, InvalidPair
from cappy_engine.slim import slim
from cappy_engine.testing import FakeSession, fake_scorer
from cappy_engine.tokenizer import PairTokenizer

LONG = "The sky is blue, and so on. " * 200


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with fake_scorer() as opened:
        yield opened


@pytest.mark.parametrize(
    "call",
    [
        lambda scorer, pairs, **how: scorer.score(pairs, **how),
        lambda scorer, pairs, **how: scorer.score_pairs(pairs, **how),
        lambda scorer, pairs, **how: scorer.encode(pairs, **how),
        lambda scorer, pairs, **how: scorer.rank("Is it?", [response for _, response in pairs], **how),
    ],
)
def test_a_pair_that_is_too_long_is_refused_where_that_was_asked_for(
    tokenizer: PairTokenizer, bundle: Path, call: Callable[..., object]
) -> None:
    session = FakeSession()
    opened = fake_scorer(session, tokenizer=tokenizer)
    pairs = [("Is it?", "Yes"), ("Is it?", LONG)]
    (tokens,) = PairTokenizer.from_file(bundle / "tokenizer.json", max_length=10_000).encode(pairs[1:]).lengths
    with pytest.raises(InvalidPair, match=rf"pair 1: has {tokens} tokens, and the model takes 512; shorten") as caught:
        call(opened, pairs, too_long="refuse")
    assert caught.value.index == 1
    assert not session.batches
    call(opened, pairs[:1], too_long="refuse")
    call(opened, pairs, too_long="truncate")
    call(opened, pairs)
    for wrong in ("refused", "", None, True):
        with pytest.raises(ValueError, match=f"unknown too_long {wrong!r}; choose from truncate, refuse"):
            call(opened, pairs[:1], too_long=wrong)


def test_a_text_of_too_many_characters_is_refused_before_it_is_tokenised(bundle: Path) -> None:
    with Scorer.open(bundle, device="cpu", max_text_chars=10) as opened:
        assert len(opened.score([("a" * 10, "b" * 10)])) == 1
        for call in (opened.score, opened.encode, opened.score_pairs):
            with pytest.raises(InvalidPair, match="pair 1: response has 11 characters, and max_text_chars is 10"):
                call([("a", "b"), ("a", "b" * 11)])
        with pytest.raises(InvalidPair, match="pair 0: instruction has 11 characters"):
            opened.rank("a" * 11, ["b"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"padding": "none"}, "unknown padding 'none'; choose from removed, avoided, allowed"),
        ({"padding": ""}, "unknown padding ''; choose from"),
        ({"padding": 7}, "unknown padding 7; choose from"),
        ({"padding": ["removed"]}, r"unknown padding \['removed'\]; choose from"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, got 0"),
        ({"max_batch_tokens": "512"}, "max_batch_tokens must be a whole number of at least 1, got str '512'"),
        ({"max_batch_tokens": True}, "max_batch_tokens must be a whole number of at least 1, got bool True"),
        ({"max_batch_tokens": 2.5}, "max_batch_tokens must be a whole number of at least 1, got float 2.5"),
        ({"max_batch_tokens": float("nan")}, "max_batch_tokens must be a whole number of at least 1, got float nan"),
        ({"progress": True}, "progress must be a function, got bool True"),
    ],
)
@pytest.mark.parametrize("pairs", [[], [("a", "b")]])
def test_an_option_of_a_wrong_kind_is_a_wrong_argument(
    scorer: Scorer, options: dict[str, Any], problem: str, pairs: list[tuple[str, str]]
) -> None:
    for call in (scorer.score_pairs, lambda pairs, **how: scorer.score_encoded(scorer.encode(pairs), **how)):
        with pytest.raises(ValueError, match=problem):
            call(pairs, **options)


@pytest.mark.parametrize("encoded", [3, None, [("Is it?", "Yes")]])
def test_what_was_not_encoded_is_not_scored_as_if(scorer: Scorer, encoded: Any) -> None:
    with pytest.raises(ValueError, match=r"score_encoded takes what encode made, got .*; score_pairs takes pairs"):
        scorer.score_encoded(encoded)


def test_pairs_of_another_tokenizer_or_of_too_many_tokens_are_not_scored(scorer: Scorer) -> None:
    content = (EMBEDDED / "tokenizer.json").read_bytes()
    pairs, limit = [("a", "b " * 2000), ("a", "b")], 512
    same = PairTokenizer.from_bytes(content, max_length=limit).encode(pairs)
    for encoded in (same, same.chosen([1]), dataclasses.replace(same, tokenizer=None)):
        assert len(scorer.score_encoded(encoded).scores) == len(encoded)
    other = PairTokenizer.from_bytes(content + b" ", max_length=limit).encode(pairs)
    for encoded in (other, other.distinct()[0], EncodedPairs.joined([other, other])):
        with pytest.raises(ValueError, match="encoded by another model's tokenizer; encode them with this scorer"):
            scorer.score_encoded(encoded)
    with pytest.raises(ValueError, match="encoded by several tokenizers"):
        EncodedPairs.joined([same, other])
    longer = PairTokenizer.from_bytes(content, max_length=limit + 1).encode(pairs)
    with pytest.raises(ValueError, match=f"have up to {limit + 1} tokens, and this model takes {limit}"):
        scorer.score_encoded(longer)


def test_progress_may_be_left_out(scorer: Scorer) -> None:
    pairs = [("a", "b"), ("a", "c")]
    scored = scorer.score_pairs(pairs, progress=None)
    assert scored.scores.tolist() == scorer.score(pairs).tolist()
    assert scorer.score_encoded(scorer.encode(pairs), progress=None).scores.tolist() == scored.scores.tolist()


def test_numpys_whole_numbers_are_whole_numbers(scorer: Scorer) -> None:
    budget: Any = np.int64(100)
    assert len(scorer.score_pairs([("a", "b")], max_batch_tokens=budget).scores) == 1


@pytest.mark.parametrize("bundle_asked", [None, "", 3, b"cappy-bundle", True, ["cappy-bundle"]])
def test_a_bundle_that_was_not_named_is_an_error(bundle_asked: Any) -> None:
    problem = "a bundle's folder is needed, got .*; is a variable not set"
    for call in (Scorer.open, Scorer.open_with, open_bundle, slim):
        with pytest.raises(BundleError, match=problem):
            call(bundle_asked)


@pytest.mark.parametrize("options", [{}, {"threads": 2}, "int8"])
def test_options_are_scorer_options(bundle: Path, options: Any) -> None:
    with pytest.raises(ValueError, match="options must be ScorerOptions, got "):
        Scorer.open_with(bundle, options)


def test_without_a_bundle_it_is_the_packages_own() -> None:
    for opened in (Scorer.open(device="cpu"), Scorer.open_with(options=ScorerOptions(device="cpu"))):
        with opened:
            assert opened.info.bundle == "cappy-mini, the package's own small model"
