"""Makes the workloads: the same pairs for every runner, from a seed.

A workload is a list of requests, each a list of pairs that are scored in one call. Lengths are drawn first, from the
use that the workload stands for; then each request takes the pair of the pool whose length is nearest (`texts.py` has
the pools). No pair is truncated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.peers.peer import Pair
from cappy_engine.errors import BenchmarkError
from cappy_engine.tokenizer import PairTokenizer

MAX_LENGTH = 512
CANDIDATES = 16
SINGLES = ("interactive", "lengths")
"""Workloads of one pair in each request; all others but rerank have one request."""
RERANK_LENGTHS = (30, 150)
"""Tokens of an instruction with several candidates: from, and to below."""
MOST_RESPONSE_CHARS = 200
LENGTHS = (16, 32, 64, 128, 256, 512)
DESCRIPTIONS: Mapping[str, str] = {
    "interactive": "one pair at a time, lengths as in real use (PromptSource's tasks where the text is real)",
    "lengths": f"one pair at a time, of {', '.join(map(str, LENGTHS))} tokens or the nearest there are",
    "rerank": f"one instruction with {CANDIDATES} candidates in each request",
    "bulk": "all pairs in one request, their lengths drawn lognormal (median 70 tokens, 95th percentile 300)",
    "long": "all pairs in one request, all of 480 to 512 tokens or the nearest there are",
    "questions": "all pairs in one request, in the lengths assumed for questions and answers of Natural Questions",
}
PROOF = "proof"
PROOF_DESCRIPTION = "all pairs in one request, in bulk's lengths: scored once, not timed, beside the reference"
"""Speed is judged by few pairs where a model is slow; whether scores are right, by the proof's pairs, too."""


@dataclass(frozen=True)
class Sizes:
    """Says how many requests or pairs each workload has.

    It counts requests (interactive, rerank), pairs (bulk, long, questions, proof), or pairs of each length (lengths). A
    workload of size 0 is left out. The proof takes fewer pairs where the texts have too few.
    """

    interactive: int
    lengths: int
    rerank: int
    bulk: int
    long: int
    questions: int = 0
    proof: int = 0

    @property
    def names(self) -> list[str]:
        """The workloads with a time that are not left out."""
        return [name for name in DESCRIPTIONS if getattr(self, name)]


@dataclass(frozen=True)
class Workload:
    """Requests that are scored one after another, each in one call.

    `token_counts` is (pairs,) int64, in the same order.
    """

    name: str
    requests: tuple[tuple[Pair, ...], ...]
    token_counts: npt.NDArray[np.int64]

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, request after request."""
        return [pair for request in self.requests for pair in request]

    @property
    def sha256(self) -> str:
        """Of the requests as JSON."""
        return hashlib.sha256(json.dumps(self.requests, ensure_ascii=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Counts and lengths, for the report."""
        low, middle, high = (float(np.percentile(self.token_counts, share)) for share in (5, 50, 95))
        return {
            "name": self.name,
            "description": DESCRIPTIONS.get(self.name, PROOF_DESCRIPTION),
            "requests": len(self.requests),
            "pairs": len(self.token_counts),
            "tokens": int(self.token_counts.sum()),
            "lengths": {"p5": low, "p50": middle, "p95": high, "max": int(self.token_counts.max())},
            **({"steps": self.steps} if self.name == "lengths" else {}),
            "sha256": self.sha256,
        }

    @property
    def steps(self) -> list[int]:
        """Give the median count of tokens in the pairs that stand for each of LENGTHS.

        The texts may not have pairs of exactly these lengths.
        """
        return [int(np.median(part)) for part in np.array_split(self.token_counts, len(LENGTHS))]


class Pool:
    """Holds pairs with their lengths in tokens; workloads take the nearest in length, none twice."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: PairTokenizer) -> None:
        encoded = tokenizer.encode(pairs)
        order = [row for row in np.argsort(encoded.lengths, kind="stable") if not encoded.truncated[row]]
        self._pairs = [pairs[row] for row in order]
        self._lengths = encoded.lengths[order]
        self._is_taken = np.zeros(len(order), dtype=np.bool_)

    def __len__(self) -> int:
        """Count the pairs, taken or not."""
        return len(self._pairs)

    @property
    def left(self) -> int:
        """The pairs that are not taken yet."""
        return int((~self._is_taken).sum())

    def short_responses(self) -> list[str]:
        """List the different responses of less than MOST_RESPONSE_CHARS, but the empty one."""
        return sorted({response for _, response in self._pairs if 0 < len(response) < MOST_RESPONSE_CHARS})

    def take(self, lengths: Iterable[int]) -> list[Pair]:
        """Take the nearest pair for each length, none twice. Raises BenchmarkError when the pool is used up.

        >>> pool.take([16, 512])
        """
        found = []
        for length in lengths:
            distance = np.where(self._is_taken, np.iinfo(np.int64).max, np.abs(self._lengths - length))
            row = int(distance.argmin())
            if self._is_taken[row]:
                raise BenchmarkError(f"the texts have only {len(self._pairs)} pairs that fit; give more with --pairs")
            self._is_taken[row] = True
            found.append(self._pairs[row])
        return found


def make_workloads(
    pairs: Sequence[Pair], tokenizer: PairTokenizer, sizes: Sizes, *, seed: int, wanted: Collection[str] = ()
) -> list[Workload]:
    """Make every workload and the proof from the same pool, or only the `wanted` ones. The proof is the last.

    A wanted workload has the same pairs without the others, if the pool is large enough for all. In a smaller pool the
    others take no pairs. Interactive lengths are those of the pool's first pairs (`read_pool` puts the ones of real use
    first). Raises BenchmarkError if there are too few pairs, or too few responses for `rerank`.

        >>> [one.name for one in make_workloads(pairs, tokenizer, sizes, seed=0)]
        ['interactive', 'lengths', 'rerank', 'bulk', 'long']
    """
    random = np.random.default_rng(seed)
    pool = Pool(pairs, tokenizer)
    usual = tokenizer.encode(pairs[: max(1, len(pairs) // 4)]).lengths
    names = [name for name in sizes.names if name in wanted or not wanted]
    lengths: dict[str, list[int]] = {  # all are drawn, so that each is the same without others
        "interactive": random.choice(usual, sizes.interactive).tolist(),
        "lengths": np.repeat(LENGTHS, sizes.lengths).tolist(),
        "bulk": bulk_lengths(random, sizes.bulk),
        "long": random.integers(480, MAX_LENGTH + 1, sizes.long).tolist(),
        "questions": question_lengths(random, sizes.questions),
    }
    if sum(map(len, lengths.values())) > len(pool):
        lengths = {name: drawn for name, drawn in lengths.items() if name in names}
    taken = {name: pool.take(drawn) for name, drawn in lengths.items()}
    requests = {name: [[pair] for pair in found] if name in SINGLES else [found] for name, found in taken.items()}
    if "rerank" in names:  # it and the proof are the last to take from the pool, so that they change no other
        requests["rerank"] = _rerank_requests(pool, random, sizes)
    count = min(sizes.proof, pool.left) if PROOF in wanted or not wanted else 0
    if count:
        requests[PROOF] = [pool.take(bulk_lengths(random, count))]
        names.append(PROOF)
    return [_workload(name, requests[name], tokenizer) for name in names]


def bulk_lengths(random: np.random.Generator, count: int) -> list[int]:
    """Draw lengths in tokens as of bulk: lognormal, exp(4.25) is 70, and exp(4.25 + 1.645 * 0.885) is 300.

    >>> bulk_lengths(np.random.default_rng(0), 2)
    [78, 62]
    """
    drawn = random.lognormal(mean=4.25, sigma=0.885, size=count)
    return np.clip(drawn, 8, MAX_LENGTH).astype(np.int64).tolist()  # type: ignore[no-any-return]


def question_lengths(random: np.random.Generator, count: int) -> list[int]:
    """Draw lengths in tokens as assumed for pairs of Natural Questions: mean 147, median 115, 95th percentile 372.

    sentence-transformers/natural-questions has questions of some ten words, and answers that are paragraphs of
    Wikipedia, "most short, some long" (its authors' benchmark of rerankers). We have not the data: 12 tokens of
    question and 4 special ones, and lognormal answers, exp(4.605) is 100 and exp(4.605 + 1.645 * 0.775) is 358, are an
    assumption. With the data at hand, give its pairs in a file instead.

        >>> question_lengths(np.random.default_rng(0), 2)
        [126, 106]
    """
    drawn = 16 + random.lognormal(mean=4.605, sigma=0.775, size=count)
    return np.clip(drawn, 24, MAX_LENGTH).astype(np.int64).tolist()  # type: ignore[no-any-return]


def _rerank_requests(pool: Pool, random: np.random.Generator, sizes: Sizes) -> list[list[Pair]]:
    """Instructions of everyday length, each with the same number of distinct responses of other pairs."""
    responses = pool.short_responses()
    if len(responses) < CANDIDATES:
        others = " ".join(f"--workload {name}" for name in sizes.names if name != "rerank")
        raise BenchmarkError(
            f"the workload rerank needs {CANDIDATES} different responses of less than {MOST_RESPONSE_CHARS} "
            f"characters, and the texts have {len(responses)}; leave it out: {others}"
        )
    instructions = pool.take(random.integers(*RERANK_LENGTHS, sizes.rerank).tolist())
    return [
        [(instruction, responses[at]) for at in random.choice(len(responses), CANDIDATES, replace=False)]
        for instruction, _ in instructions
    ]


def _workload(name: str, requests: Sequence[Sequence[Pair]], tokenizer: PairTokenizer) -> Workload:
    frozen = tuple(tuple(request) for request in requests)
    counts = tokenizer.encode([pair for request in frozen for pair in request]).lengths
    return Workload(name, frozen, counts)
