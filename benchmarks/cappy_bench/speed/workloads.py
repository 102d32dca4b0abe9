"""Makes the workloads: the same pairs for every runner, from a seed.

A workload is a list of requests, each a list of pairs that are scored in one call. Lengths are drawn first, from the
use that the workload stands for; then each request takes the pair of the pool whose length is nearest. The pool is real
text where there is some (`read_pool`), else made of words (`make_pool`). No pair is truncated, and none begins or ends
in white space, so that tools which strip or cut otherwise score the same tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.peers.peer import Pair
from cappy_engine.bulk.jsonl import open_lines
from cappy_engine.bulk.lines import numbered
from cappy_engine.bulk.rows import read_fields, read_rows
from cappy_engine.checks import shown
from cappy_engine.errors import BenchmarkError, InvalidLine
from cappy_engine.pairs import text_problem
from cappy_engine.tokenizer import PairTokenizer
from cappy_export.proof.pairs import default_pairs

MAX_LENGTH = 512
CANDIDATES = 16
RERANK_LENGTHS = (30, 150)
"""Tokens of an instruction with several candidates: from, and to below."""
LENGTHS = (16, 32, 64, 128, 256, 512)
DESCRIPTIONS: Mapping[str, str] = {
    "interactive": "one pair at a time, lengths as in real use (PromptSource's tasks where the text is real)",
    "lengths": f"one pair at a time, of {', '.join(map(str, LENGTHS))} tokens",
    "rerank": f"one instruction with {CANDIDATES} candidates in each request",
    "bulk": "all pairs in one request, their lengths drawn lognormal (median 70 tokens, 95th percentile 300)",
    "long": "all pairs in one request, all of 480 to 512 tokens or the nearest there are",
    "padded": "pairs of bulk's lengths, every one computed at 512 tokens; here padding counts as work, equal for all",
}
USUAL = "promptsource_test.jsonl.gz"
POOL = 12_000
"""Pairs that are looked at, of those that a pool has."""


@dataclass(frozen=True)
class Sizes:
    """How many requests (interactive, rerank), pairs (bulk, long, padded) or pairs of each length (lengths)."""

    interactive: int
    lengths: int
    rerank: int
    bulk: int
    long: int
    padded: int


@dataclass(frozen=True)
class Workload:
    """Requests that are scored one after another, each in one call.

    `token_counts` is (pairs,) int64, in the same order.
    """

    name: str
    requests: tuple[tuple[Pair, ...], ...]
    token_counts: npt.NDArray[np.int64]
    pad_to: int | None = None

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, request after request."""
        return [pair for request in self.requests for pair in request]

    @property
    def worked_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each pair that count as work: its own, or `pad_to` if set."""
        return self.token_counts if self.pad_to is None else np.full_like(self.token_counts, self.pad_to)

    @property
    def sha256(self) -> str:
        """Of the requests as JSON."""
        return hashlib.sha256(json.dumps(self.requests, ensure_ascii=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Counts and lengths, for the report; `tokens` are those that count as work."""
        low, middle, high = (float(np.percentile(self.token_counts, share)) for share in (5, 50, 95))
        return {
            "name": self.name,
            "description": DESCRIPTIONS[self.name],
            "requests": len(self.requests),
            "pairs": len(self.token_counts),
            "tokens": int(self.worked_lengths.sum()),
            "pad_to": self.pad_to,
            "lengths": {"p5": low, "p50": middle, "p95": high, "max": int(self.token_counts.max())},
            "sha256": self.sha256,
        }


class Pool:
    """Holds pairs with their lengths in tokens; workloads take the nearest in length, none twice."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: PairTokenizer) -> None:
        encoded = tokenizer.encode(pairs)
        order = [row for row in np.argsort(encoded.lengths, kind="stable") if not encoded.truncated[row]]
        self._pairs = [pairs[row] for row in order]
        self._lengths = encoded.lengths[order]
        self._is_taken = np.zeros(len(order), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def pairs(self) -> list[Pair]:
        """All pairs that are not too long, shortest first."""
        return self._pairs

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Their lengths in tokens, (n,) int64."""
        return self._lengths

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


def make_workloads(pairs: Sequence[Pair], tokenizer: PairTokenizer, sizes: Sizes, *, seed: int) -> list[Workload]:
    """Make every workload, from the same pool.

    Interactive lengths are those of the pool's first pairs (`read_pool` puts the ones of real use first). Raises
    BenchmarkError if there are too few pairs.

        >>> [one.name for one in make_workloads(pairs, tokenizer, sizes, seed=0)]
        ['interactive', 'lengths', 'rerank', 'bulk', 'long', 'padded']
    """
    random = np.random.default_rng(seed)
    pool = Pool(pairs, tokenizer)
    usual = tokenizer.encode(pairs[: max(1, len(pairs) // 4)]).lengths
    singles = {
        "interactive": pool.take(random.choice(usual, sizes.interactive)),
        "lengths": pool.take(np.repeat(LENGTHS, sizes.lengths).tolist()),
    }
    many = {
        "bulk": pool.take(bulk_lengths(random, sizes.bulk)),
        "long": pool.take(random.integers(480, MAX_LENGTH + 1, sizes.long)),
        "padded": pool.take(bulk_lengths(random, sizes.padded)),
    }
    requests = {name: [[pair] for pair in found] for name, found in singles.items()}
    requests["rerank"] = _rerank_requests(pool, random, sizes.rerank)
    requests |= {name: [found] for name, found in many.items()}
    return [_workload(name, requests[name], tokenizer) for name in DESCRIPTIONS]


def choose_pool(pairs: Path | None, data: Path | None, *, seed: int) -> tuple[list[Pair], str]:
    """Read the texts of a file, or of the tasks in a folder, or make some up; also say what to call them.

    Raises InvalidLine and OSError.

        >>> choose_pool(None, None, seed=0)[1]
        "made of words of the package's parity pairs"
    """
    if pairs is not None:
        return read_pairs_file(pairs), f"the file {pairs.name}"
    found = read_pool(data, seed=seed) if data is not None else []
    if found:
        return found, "PromptSource's and BIG-Bench's tasks"
    return make_pool_like(default_pairs(), seed=seed), "made of words of the package's parity pairs"


def read_pool(folder: Path, *, seed: int) -> list[Pair]:
    """Read real pairs from the files of `folder`, if it has any.

    First come PromptSource's tasks, then BIG-Bench's, whose instructions are long. Raises BenchmarkError with the line
    of a file that is not of that form, and OSError.

        >>> read_pool(Path("data"), seed=0)
    """
    usual: list[Pair] = []
    long: list[Pair] = []
    for path in pool_files(folder):
        try:
            if path.name == USUAL:
                usual += _read_pairs(path)
            else:
                long += _read_first_references(path)
        except InvalidLine as error:
            raise BenchmarkError(f"{path}, {error}") from error
    pairs: list[Pair] = []
    for found, share in ((usual, POOL // 4), (long + usual, POOL - POOL // 4)):
        order = np.random.default_rng(seed).permutation(len(found))[:share]
        pairs += [(found[place][0].strip(), found[place][1].strip()) for place in order]
    return _distinct(pairs)


def pool_files(folder: Path) -> list[Path]:
    """List the files that `read_pool` reads, of those that `folder` has.

    >>> pool_files(Path("data"))
    [PosixPath('data/promptsource_test.jsonl.gz')]
    """
    usual = folder / USUAL
    return [*([usual] if usual.exists() else []), *sorted(folder.glob("bigbench/*_train.jsonl.gz"))]


def make_pool(words: Sequence[str], *, seed: int, count: int = 4000) -> list[Pair]:
    """Make pairs of random words: first a quarter of everyday lengths, then longer ones.

    >>> make_pool(["sky", "blue"], seed=0, count=1)
    """
    random = np.random.default_rng(seed)
    longest = np.where(np.arange(count) < count // 4, 110, 450)
    return _distinct(
        (
            " ".join(random.choice(words, random.integers(3, most))),
            " ".join(random.choice(words, random.integers(1, 12))),
        )
        for most in longest
    )


def make_pool_like(pairs: Iterable[Pair], *, seed: int, count: int = 4000) -> list[Pair]:
    """Make pairs as `make_pool` does, of the words of `pairs`.

    >>> make_pool_like([("Is the sky blue?", "Yes")], seed=0, count=1)
    """
    words = {word for pair in pairs for text in pair for word in text.split() if len(word) < 20}
    words = {word for word in words if "<" not in word}  # "<pad>" in a text is something else to every tool
    return make_pool(sorted(words), seed=seed, count=count)


def read_pairs_file(path: Path) -> list[Pair]:
    """Read the distinct pairs of a JSON Lines file with `instruction` and `response`, stripped.

    Raises BenchmarkError with the line, and OSError.

        >>> read_pairs_file(Path("pairs.jsonl"))
    """
    try:
        return _distinct((first.strip(), second.strip()) for first, second in _read_pairs(path))
    except InvalidLine as error:
        raise BenchmarkError(f"{path}, {error}") from error


def bulk_lengths(random: np.random.Generator, count: int) -> list[int]:
    """Draw lengths in tokens as of bulk: lognormal, exp(4.25) is 70, and exp(4.25 + 1.645 * 0.885) is 300.

    >>> bulk_lengths(np.random.default_rng(0), 2)
    [78, 62]
    """
    drawn = random.lognormal(mean=4.25, sigma=0.885, size=count)
    return np.clip(drawn, 8, MAX_LENGTH).astype(np.int64).tolist()  # type: ignore[no-any-return]


def _rerank_requests(pool: Pool, random: np.random.Generator, count: int) -> list[list[Pair]]:
    """Instructions of everyday length, each with the same number of distinct responses of other pairs."""
    responses = sorted({response for _, response in pool.pairs if response and len(response) < 200})
    instructions = pool.take(random.integers(*RERANK_LENGTHS, count).tolist())
    return [
        [(instruction, responses[at]) for at in random.choice(len(responses), CANDIDATES, replace=False)]
        for instruction, _ in instructions
    ]


def _workload(name: str, requests: Sequence[Sequence[Pair]], tokenizer: PairTokenizer) -> Workload:
    frozen = tuple(tuple(request) for request in requests)
    counts = tokenizer.encode([pair for request in frozen for pair in request]).lengths
    return Workload(name, frozen, counts, pad_to=MAX_LENGTH if name == "padded" else None)


def _read_pairs(path: Path) -> list[Pair]:
    with open_lines(path) as lines:
        return [row.pair for row in read_rows(lines)]


def _read_first_references(path: Path) -> list[Pair]:
    """Read a task's instructions, each with its first right answer."""
    pairs: list[Pair] = []
    with open_lines(path) as lines:
        for number, line in numbered(lines):
            fields = read_fields(line, number, ("instruction",))
            if fields is not None:
                references = fields.get("references")
                if not isinstance(references, list) or not references or text_problem(references[0]):
                    raise InvalidLine(number, f"needs 'references', a list of texts; found {shown(references)}")
                pairs.append((fields["instruction"], references[0]))
    return pairs


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    return [pair for pair in dict.fromkeys(pairs) if pair[0] and pair[1]]
