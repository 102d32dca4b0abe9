"""A tokenizer that fails, or whose library panics, is an error of ours: of the bundle at loading, of the pair later."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from cappy_engine import Scorer
from cappy_engine.bundle import open_bundle
from cappy_engine.errors import BundleError, InvalidPair, ScoringError
from cappy_engine.tokenizer import PairTokenizer
from tests.support.bundles import add_file, change_manifest
from tests.support.places import TINY


class Panicking:
    """A tokenizer whose library panics on a text, as a Rust one does: with what is not even an Exception."""

    def __init__(self, tokenizer: Tokenizer, bad: str, error: BaseException) -> None:
        self._tokenizer = tokenizer
        self._bad = bad
        self._error = error

    def encode(self, *texts: str, add_special_tokens: bool = True) -> object:
        return self._tokenizer.encode(*texts, add_special_tokens=add_special_tokens)

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> object:
        if self._bad in texts or (self._bad == "company" and len(texts) > 1):
            raise self._error
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


PanicException = type("PanicException", (BaseException,), {})
ERRORS = [Exception("index out of bounds"), PanicException("index out of bounds")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_text_at_which_the_tokenizer_fails_is_named(error: BaseException) -> None:
    library: Any = Panicking(Tokenizer.from_file(str(TINY / "tokenizer.json")), "bad", error)
    tokenizer = PairTokenizer(library, max_length=512)
    with pytest.raises(InvalidPair, match=r"^pair 1: response cannot be tokenised: index out of bounds"):
        tokenizer.encode([("a", "b"), ("a", "bad"), ("bad", "bad")])
    assert len(tokenizer.encode([("a", "b")])) == 1


def test_texts_at_which_the_tokenizer_fails_together_blame_no_pair() -> None:
    library: Any = Panicking(Tokenizer.from_file(str(TINY / "tokenizer.json")), "company", Exception("too many"))
    with pytest.raises(ScoringError, match="the tokenizer fails: too many") as caught:
        PairTokenizer(library, max_length=512).encode([("a" * 1000, "b")])  # shorter ones do not come together
    assert caught.value.index is None


def test_a_tokenizer_that_fails_at_any_text_blames_no_pair() -> None:
    """As where the library gets no threads: rows that are left out as bad ones would be all of a file."""
    library: Any = Panicking(Tokenizer.from_file(str(TINY / "tokenizer.json")), "", Exception("no threads"))
    tokenizer = PairTokenizer(library, max_length=512)
    library.encode_batch_fast = lambda *_, **__: (_ for _ in ()).throw(Exception("no threads"))
    with pytest.raises(ScoringError, match="the tokenizer fails: no threads") as caught:
        tokenizer.encode([("a", "b")])
    assert caught.value.index is None


def test_a_pattern_that_tries_for_ever_is_stopped_at_the_pair() -> None:
    document = json.loads((TINY / "tokenizer.json").read_bytes())
    document["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"}
    tokenizer = PairTokenizer.from_bytes(json.dumps(document).encode(), max_length=512)
    with pytest.raises(InvalidPair, match=r"^pair 1: instruction cannot be tokenised: Onig: .* retry-limit-in-match"):
        tokenizer.encode([("b", "c"), ("a" * 40 + "!", "c")])


class SoftTimeLimitExceeded(Exception):
    """What Celery raises in its handler of a signal, wherever the main thread is; a job of RQ ends likewise."""


INTERRUPTIONS = [KeyboardInterrupt(), SystemExit(), SoftTimeLimitExceeded("soft time limit"), TimeoutError("too long")]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_an_interruption_is_not_taken_for_a_failure(error: BaseException) -> None:
    library: Any = Panicking(Tokenizer.from_file(str(TINY / "tokenizer.json")), "bad", error)
    with pytest.raises(type(error)) as caught:
        PairTokenizer(library, max_length=512).encode([("a", "bad")])
    assert caught.value is error


def test_an_interruption_of_the_search_for_a_bad_text_blames_no_text() -> None:
    def stop(*_: object) -> None:
        raise SoftTimeLimitExceeded("soft time limit")

    class Stopped(Panicking):
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> object:
            if texts == ["a"]:
                signal.raise_signal(signal.SIGALRM)
            return super().encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    library: Any = Stopped(Tokenizer.from_file(str(TINY / "tokenizer.json")), "bad", ERRORS[0])
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(SoftTimeLimitExceeded):
            PairTokenizer(library, max_length=512).encode([("b", "bad")])
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=repr)
def test_an_interruption_while_a_tokenizer_is_opened_blames_no_bundle(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(content: bytes) -> object:
        raise error

    monkeypatch.setattr("cappy_engine.tokenizer.Tokenizer", SimpleNamespace(from_buffer=interrupted))
    with pytest.raises(type(error)) as caught:
        PairTokenizer.from_bytes((TINY / "tokenizer.json").read_bytes(), max_length=512)
    assert caught.value is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_tokenizer_that_fails_at_its_first_pair_is_no_tokenizer(error: BaseException) -> None:
    class Broken:
        def encode(self, *texts: str, add_special_tokens: bool = True) -> object:
            raise error

    broken: Any = Broken()
    with pytest.raises(BundleError, match="cannot encode a pair: index out of bounds"):
        PairTokenizer(broken, max_length=512)


def odd_tokenizers() -> dict[str, bytes]:
    document = json.loads((TINY / "tokenizer.json").read_bytes())
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    unigram = {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}
    return {
        "empty": b"",
        "not JSON": b"\xff\xfe",
        "deep": b"[" * 100_000,
        "no model": json.dumps({**document, "model": None}).encode(),
        "no unknown token": json.dumps({**document, "model": vocabulary}).encode(),
        "an unknown token out of range": json.dumps({**document, "model": unigram}).encode(),
        "no special tokens": json.dumps({**document, "post_processor": None, "model": vocabulary}).encode(),
    }


@pytest.mark.parametrize("name", odd_tokenizers())
def test_an_odd_tokenizer_in_a_sealed_bundle_is_an_error_of_the_bundle(copy: Path, name: str) -> None:
    change_manifest(copy, lambda document: add_file(copy, document, "tokenizer.json", odd_tokenizers()[name]))
    with pytest.raises(BundleError, match="tokenizer"):
        Scorer.open(copy, precision="int8", device="cpu")


def test_the_tokenizer_that_is_used_is_the_one_whose_digest_was_checked(copy: Path) -> None:
    bundle = open_bundle(copy)
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        bundle.read("tokenizer.json")
    assert open_bundle(TINY).read("tokenizer.json") == (TINY / "tokenizer.json").read_bytes()


def test_a_token_that_the_model_does_not_have_is_an_error_of_the_pair(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads((TINY / "tokenizer.json").read_bytes())
    tokenizer["post_processor"] = {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 5]}
    content = json.dumps(tokenizer).encode()
    change_manifest(copy, lambda document: add_file(copy, document, "tokenizer.json", content))
    with (
        Scorer.open(copy, precision="int8", device="cpu") as scorer,
        pytest.raises(ScoringError, match=r"^pair 0: ONNX Runtime failed .* out of"),
    ):
        scorer.score([("a", "b")])
    assert capfd.readouterr().err == ""  # ONNX Runtime would say the same, in red, for every try
