"""Turn pairs of texts into token ids, exactly as transformers' tokenizers do.

Each distinct text is encoded once and alone, then texts are joined (`pair_template`). The library takes some 30 bytes
for a character until a text's ids are read, so it gets texts part by part.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cappy_engine.batching import EncodedPairs, Ids
from cappy_engine.bundle_files import MAX_SMALL_BYTES
from cappy_engine.checks import check_word, described
from cappy_engine.errors import BundleError, CappyError, InvalidPair, ScoringError, reason_of
from cappy_engine.forking import tell_after_fork
from cappy_engine.pair_template import HARMLESS, TextIds, find_template, truncate_longest_first
from cappy_engine.pairs import MAX_TEXT_CHARS, TOO_LONG, Pairs, PairTexts, TooLong, read_pairs
from cappy_engine.storage import read_regular

PART_CHARS = 2_000_000
"""How many characters the library gets at once, or the one text that has more."""
TEXT_CHARS = 100
"""What a text costs besides its characters, in characters."""
ALONE_TEXTS, ALONE_CHARS = 8, 1_000
"""So few are encoded one by one before the library's threads wake up: a pair in 90 us instead of 190."""


class PairTokenizer:
    """Tokenises pairs; each distinct text of a call once, so an instruction costs the same for any count of candidates.

    `tokenizer` needs `encode_batch_fast(texts, add_special_tokens=False)`; `max_length` counts special tokens too.
    Texts of more than `max_text_chars` characters are refused. Two with one `digest` make the same ids; None if that is
    not known. Raises BundleError if special tokens alone are too many.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        max_text_chars: int = MAX_TEXT_CHARS,
        digest: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        with _translated("this tokenizer cannot encode a pair"):
            self.template = find_template(tokenizer.encode)
        self.max_length = max_length
        self.max_text_chars = max_text_chars
        self.digest = digest
        if self.template.special_tokens > max_length:
            raise BundleError(
                f"this tokenizer puts {self.template.special_tokens} special tokens around a pair, and the model takes "
                f"{max_length} tokens; export the bundle again, with its own tokenizer"
            )

    @classmethod
    def from_file(cls, path: Path, *, max_length: int) -> PairTokenizer:
        """Open a `tokenizer.json`; truncation and padding set in the file are ignored.

        Raises BundleError if the file is not a tokenizer, or joins pairs in an unknown way or with too many tokens.
        """
        try:
            content = read_regular(path, limit=MAX_SMALL_BYTES)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({reason_of(error)})") from error
        return cls.from_bytes(content, max_length=max_length)

    @classmethod
    def from_bytes(cls, content: bytes, *, max_length: int, max_text_chars: int = MAX_TEXT_CHARS) -> PairTokenizer:
        """Open the content of a `tokenizer.json`, as `from_file` does.

        >>> PairTokenizer.from_bytes(open_bundle("cappy-bundle").read("tokenizer.json"), max_length=512)
        """
        with _translated("tokenizer.json is not a tokenizer", ValueError):
            tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        digest = hashlib.sha256(content).hexdigest()
        return cls(tokenizer, max_length=max_length, max_text_chars=max_text_chars, digest=digest)

    def encode(self, pairs: Pairs, *, too_long: TooLong = "truncate") -> EncodedPairs:
        """Tokenise n pairs, truncated to `max_length` by cutting the longer text first.

        Raises InvalidPair, with the index, for what is not a pair of valid strings, and with `too_long="refuse"` for a
        pair that would be truncated.
        """
        return self.encode_texts(self.read(pairs), too_long=too_long)

    def read(self, pairs: Pairs) -> PairTexts:
        """Read the texts of pairs, for `encode_texts`. Raises InvalidPair with the index of whatever is not a pair.

        >>> tokenizer.encode_texts(tokenizer.read([("Is the sky blue?", "Yes")])).lengths
        array([10])
        """
        return read_pairs(pairs, max_text_chars=self.max_text_chars)

    def encode_texts(self, found: PairTexts, *, too_long: TooLong = "truncate") -> EncodedPairs:
        """Tokenise pairs that `read` has read; raises what `encode` does."""
        check_word("too_long", too_long, TOO_LONG)
        budget = self.max_length - self.template.special_tokens
        ids, counts = self._encode_each(found, budget)
        token_ids, type_ids = [], []
        types = dict[tuple[int, int], Ids]()  # pairs with as many tokens of each text share them
        truncated = np.zeros(len(found.places), dtype=np.bool_)
        for row, (instruction, response) in enumerate(found.places.tolist()):
            whole = counts[instruction], counts[response]
            kept = truncate_longest_first(*whole, budget)
            truncated[row] = kept != whole
            if truncated[row] and too_long == "refuse":
                has = f"has {sum(whole) + self.template.special_tokens} tokens, and the model takes {self.max_length}"
                raise InvalidPair(row, f"{has}; shorten it, or let it be truncated")
            token_ids.append(self.template.join(ids[instruction][: kept[0]], ids[response][: kept[1]]))
            if kept not in types:
                types[kept] = self.template.join_types(*kept)
            type_ids.append(types[kept])
        lengths = np.array([len(row_ids) for row_ids in token_ids], dtype=np.int64)
        is_empty = np.array(counts, dtype=np.int64) == 0
        without_instruction = tuple(np.flatnonzero(is_empty[found.places[:, 0]]).tolist())
        return EncodedPairs(token_ids, type_ids, lengths, truncated, without_instruction, self.digest)

    def _encode_each(self, found: PairTexts, budget: int) -> tuple[list[TextIds], list[int]]:
        """Encode all texts; returns up to `budget` ids of each, since no pair has more, and how many it has."""
        ids, counts = list[TextIds](), list[int]()
        for texts in _parts(found.texts):
            tell_after_fork(_THREADS)
            try:
                with _translated("the tokenizer fails"):
                    encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            except BundleError as error:
                raise self._blame(found, str(error)) from error
            counts += map(len, encodings)
            ids += (np.array(encoding.ids[:budget], dtype=np.uint32) for encoding in encodings)
            del encodings  # before there are those of the next part
        return ids, counts

    def check(self, encoded: EncodedPairs) -> None:
        """Raise ValueError unless pairs are encoded, for this tokenizer, and not too long for it.

        >>> tokenizer.check(tokenizer.encode([("Is the sky blue?", "Yes")]))
        """
        if not isinstance(encoded, EncodedPairs):
            problem = f"score_encoded takes what encode made, got {described(encoded)}; score_pairs takes pairs"
            raise ValueError(problem)  # noqa: TRY004 - as for all arguments
        if None not in (encoded.tokenizer, self.digest) and encoded.tokenizer != self.digest:
            raise ValueError("these pairs were encoded by another model's tokenizer; encode them with this scorer")
        longest = int(encoded.lengths.max(initial=0))
        if longest > self.max_length:
            raise ValueError(
                f"these pairs have up to {longest} tokens, and this model takes {self.max_length}; encode them with "
                "this scorer"
            )

    def _blame(self, pairs: PairTexts, problem: str) -> CappyError:
        """Find the first text that the library does not encode alone either; none if it fails at a harmless one."""
        if self._problem_with(HARMLESS, "it"):
            return ScoringError(problem)
        for index, places in enumerate(pairs.places.tolist()):
            for part, place in zip(("instruction", "response"), places, strict=True):
                if found := self._problem_with(pairs.texts[place], part):
                    return InvalidPair(index, found)
        return ScoringError(problem)

    def _problem_with(self, text: str, name: str) -> str:
        """Say why the library does not encode a text alone; empty if it does."""
        try:
            with _translated(f"{name} cannot be tokenised"):
                self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except BundleError as error:
            return str(error)
        return ""


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """Cut a list of texts where it has `PART_CHARS`; of a short list, each text is a part, and takes one thread."""
    is_short = len(texts) <= ALONE_TEXTS and sum(map(len, texts)) <= ALONE_CHARS
    most = 0 if is_short else PART_CHARS
    start = chars = 0
    for place, text in enumerate(texts):
        if chars and chars + len(text) > most:
            yield texts[start:place]
            start, chars = place, 0
        chars += len(text) + TEXT_CHARS
    if chars:
        yield texts[start:]


class _LibraryThreads:
    """The library's threads: all tokenizers of a process share them, and they outlive each."""

    def after_fork(self) -> None:
        """Have the library work without threads in a forked child, where the parent's are not."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextlib.contextmanager
def _translated(problem: str, *others: type[Exception]) -> Iterator[None]:
    """Raise BundleError for an error of the library: Exception itself, a panic, or one of `others`.

    A panic is not an Exception. Any other error comes from a signal (Ctrl-C, the time limit of a job), and stays.
    """
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, *others) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{problem}: {str(error)[:_LONGEST_REASON]}") from error


_LONGEST_REASON = 300
_THREADS = _LibraryThreads()
