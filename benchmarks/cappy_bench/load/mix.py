"""Makes the load: requests of mixed sizes and lengths, each one instruction with its candidates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.peers.peer import Pair
from cappy_bench.speed.workloads import MOST_RESPONSE_CHARS, RERANK_LENGTHS, Pool, bulk_lengths
from cappy_engine.errors import BenchmarkError
from cappy_engine.tokenizer import PairTokenizer

MOST_INSTRUCTION_TOKENS = 400
"""Leaves room for candidates of MOST_RESPONSE_CHARS: nothing is truncated, which other servers do elsewhere."""


@dataclass(frozen=True)
class Load:
    """Requests, each the pairs of one instruction, with the tokens of each request: (n,) int64."""

    requests: tuple[tuple[Pair, ...], ...]
    tokens: npt.NDArray[np.int64]
    source: str

    @property
    def sizes(self) -> list[int]:
        """The pairs of each request."""
        return [len(request) for request in self.requests]

    def describe(self) -> dict[str, Any]:
        """Counts and tokens, for the report."""
        sizes, shares = np.array(self.sizes), (5, 50, 95)
        return {
            "requests": len(self.requests),
            "pairs": int(sizes.sum()),
            "tokens": int(self.tokens.sum()),
            "requests_by_pairs": {str(size): int((sizes == size).sum()) for size in sorted(set(self.sizes))},
            "tokens_of_a_request": {f"p{share}": float(np.percentile(self.tokens, share)) for share in shares}
            | {"max": int(self.tokens.max())},
            "texts": self.source,
            "sha256": hashlib.sha256(json.dumps(self.requests, ensure_ascii=True).encode()).hexdigest(),
        }


def make_load(
    texts: tuple[Sequence[Pair], str], tokenizer: PairTokenizer, *, sizes: Sequence[int], count: int, seed: int
) -> Load:
    """Make `count` requests in random order; `texts` are pairs, and where they are from.

    Single pairs have the lengths of the workload "bulk", short and long. Instructions with several candidates have
    those of "rerank". The larger a size, the rarer it is: in proportion to the inverse of its square root. So of 1, 4,
    16 and 64 pairs half of the requests are single ones, and half of all pairs are in the largest. No pair is
    truncated. Raises BenchmarkError if there are too few texts.

        >>> make_load(choose_pool(None, None, seed=0), tokenizer, sizes=(1, 4, 16, 64), count=256, seed=0).sizes[:4]
        [4, 1, 1, 16]
    """
    random = np.random.default_rng(seed)
    pool = Pool(texts[0], tokenizer)
    responses = pool.short_responses()
    if len(responses) < max(sizes):
        raise BenchmarkError(
            f"a request of {max(sizes)} pairs needs as many different responses, and the texts have "
            f"{len(responses)} of less than {MOST_RESPONSE_CHARS} characters; give more texts, or fewer pairs a request"
        )
    weights = 1 / np.sqrt(np.array(sizes, dtype=np.float64))
    counts = random.choice(np.array(sizes), count, p=weights / weights.sum())
    bulk = np.minimum(bulk_lengths(random, count), MOST_INSTRUCTION_TOKENS)
    lengths = np.where(counts == 1, bulk, random.integers(*RERANK_LENGTHS, count))
    instructions = [instruction for instruction, _ in pool.take(lengths.tolist())]
    requests = tuple(
        tuple((instruction, responses[at]) for at in random.choice(len(responses), size, replace=False))
        for instruction, size in zip(instructions, counts.tolist(), strict=True)
    )
    encoded = tokenizer.encode([pair for request in requests for pair in request])
    ends = np.cumsum(counts)
    tokens = np.add.reduceat(encoded.lengths, ends - counts)
    return Load(requests, tokens, texts[1])
