"""Tokenise pairs part by part, beside a device that computes the part before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cappy_engine.batching import EncodedPairs
from cappy_engine.errors import InvalidPair, ScoringError
from cappy_engine.overlap import ahead
from cappy_engine.pairs import Pairs, PairTexts, TooLong
from cappy_engine.scored import Scored
from cappy_engine.tokenizer import PairTokenizer

PART_PAIRS = 512
"""How many pairs a GPU gets while the next ones are tokenised. 256 and 1,024 took as long on an H200 with 16 cores."""


def score_in_parts(
    tokenizer: PairTokenizer,
    pairs: Pairs,
    score: Callable[[EncodedPairs], Scored],
    *,
    too_long: TooLong,
    count: int | None,
) -> Scored:
    """Tokenise `count` pairs at a time in a thread, and `score` them here; what is raised has the index among all.

    All at once where `count` is None, and where a pair may be refused: that must come before anything is computed.

        >>> score_in_parts(tokenizer, pairs, scorer.score_encoded, too_long="truncate", count=512).scores.shape
        (3000,)
    """
    texts = tokenizer.read(pairs)
    if count is None or len(texts.places) <= count or too_long != "truncate":
        return score(tokenizer.encode_texts(texts, too_long=too_long))
    scored: list[Scored] = []
    with ahead(_encoded(tokenizer, texts, count)) as parts:
        for part in parts:
            try:
                scored.append(score(part))
            except ScoringError as error:
                if error.index is None:
                    raise
                raise ScoringError(error.problem, len(scored) * count + error.index) from error
    return Scored.joined(scored)


def _encoded(tokenizer: PairTokenizer, texts: PairTexts, count: int) -> Iterator[EncodedPairs]:
    for start in range(0, len(texts.places), count):
        try:
            yield tokenizer.encode_texts(texts.part(start, start + count))
        except InvalidPair as error:
            raise InvalidPair(start + error.index, error.problem) from error
