"""Turn pairs of texts into token ids, exactly as transformers' tokenizers do, each distinct text once.

The library takes some 30 bytes for a character until a text's ids are read, so it gets texts part by part.
Texts are encoded alone, then joined: truncated `longest_first`, with the special tokens that the tokenizer's own
post-processor puts around a pair. The joining is ours because the library's (`Tokenizer.post_process` with truncation)
builds every combination of overflowing parts: 3 s for one pair of 100,000 characters each, and all the memory there is
for a million. Where the special tokens go is learnt from the library when the tokenizer is opened, and checked there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from cappy_engine.batching import EncodedPairs, Ids
from cappy_engine.bundle_files import MAX_SMALL_BYTES
from cappy_engine.checks import check_word, described
from cappy_engine.errors import BundleError, CappyError, InvalidPair, ScoringError, reason_of
from cappy_engine.forking import tell_after_fork
from cappy_engine.pairs import MAX_TEXT_CHARS, TOO_LONG, Pairs, PairTexts, TooLong, read_pairs
from cappy_engine.storage import read_regular

HARMLESS = "a"
"""A text that every tokenizer encodes: it was encoded when this one was opened."""
PART_CHARS = 2_000_000
"""How many characters the library gets at once, or the one text that has more."""
TEXT_CHARS = 100
"""What a text costs besides its characters, in characters."""
TextIds = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class PairTemplate:
    """The special tokens around a pair: `prefix A middle B suffix`, and the token type ids of these five parts."""

    prefix: Ids
    middle: Ids
    suffix: Ids
    type_ids: tuple[int, ...]

    @property
    def special_tokens(self) -> int:
        """Count the special tokens of a pair."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, first: TextIds, second: TextIds) -> Ids:
        """Join two texts' token ids into the pair's, (length,) int64."""
        return np.concatenate([self.prefix, first, self.middle, second, self.suffix])

    def join_types(self, first: int, second: int) -> Ids:
        """Make the token type ids of a pair whose texts have so many tokens, (length,) int64: pairs may share them."""
        lengths = (len(self.prefix), first, len(self.middle), second, len(self.suffix))
        types = np.repeat(np.array(self.type_ids, dtype=np.int64), lengths)
        types.setflags(write=False)
        return types


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
        self.template = find_template(tokenizer)
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
        """Raise ValueError for what is not encoded, or was encoded for another tokenizer or for longer pairs.

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


def truncate_longest_first(first: int, second: int, budget: int) -> tuple[int, int]:
    """Count the tokens that are kept of a pair's two texts, by the rule of the tokenizers library.

    The longer text loses first. Where both must be cut and the budget is odd, the text that was longer keeps one more
    (the second, if they were equal).

        >>> truncate_longest_first(10, 3, 9)
        (6, 3)
    """
    if first + second <= budget:
        return first, second
    shorter = min(first, second, budget // 2)
    longer = budget - shorter
    return (longer, shorter) if first > second else (shorter, longer)


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """Cut a list of texts where it has `PART_CHARS`."""
    start = chars = 0
    for place, text in enumerate(texts):
        if chars and chars + len(text) > PART_CHARS:
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


def find_template(tokenizer: Tokenizer) -> PairTemplate:
    """Learn from the tokenizer itself which special tokens it puts around a pair.

    Raises BundleError if its output for a probe cannot be explained by a template.
    """
    with _translated("this tokenizer cannot encode a pair"):
        first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (HARMLESS, "b"))
        joined = tokenizer.encode(HARMLESS, "b")
        template = _split(joined, first.ids, second.ids)
        probe = ("an example, rather longer", "its\nanswer")
        parts = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32) for text in probe]
        expected = tokenizer.encode(*probe)
    if (
        template is None
        or template.join(parts[0], parts[1]).tolist() != expected.ids
        or template.join_types(len(parts[0]), len(parts[1])).tolist() != expected.type_ids
    ):
        raise BundleError(f"this tokenizer joins a pair in an unknown way: ('a', 'b') becomes {joined.tokens}")
    return template


def _split(joined: Any, first: list[int], second: list[int]) -> PairTemplate | None:
    """Cut the ids of a joined pair into prefix, first, middle, second, suffix; None if they are not found in it."""
    ids, types = joined.ids, joined.type_ids
    starts = [at for at in range(len(ids)) if ids[at : at + len(first)] == first]
    for start in starts:
        after = start + len(first)
        for at in range(after, len(ids)):
            if ids[at : at + len(second)] == second:
                end = at + len(second)
                cuts = (ids[:start], ids[after:at], ids[end:])
                prefix, middle, suffix = (np.array(cut, dtype=np.int64) for cut in cuts)
                sections = (types[:start], types[start:after], types[after:at], types[at:end], types[end:])
                return PairTemplate(prefix, middle, suffix, tuple(types[0] if types else 0 for types in sections))
    return None


@contextlib.contextmanager
def _translated(problem: str, *others: type[Exception]) -> Iterator[None]:
    """Raise BundleError for what the library raises: Exception itself, a panic, which is not even one, or `others`.

    Anything else comes from a signal, as Ctrl-C or the time limit of a job does, and is left as it is.
    """
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, *others) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{problem}: {str(error)[:_LONGEST_REASON]}") from error


_LONGEST_REASON = 300
_THREADS = _LibraryThreads()
