"""Read all examples once before training: check them, count them, and choose which are held out.

Constant memory: of the instructions only those with the smallest numbers are kept, and their examples are held out.
Several processes share the shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cappy_engine.bulk.formats.entries import Position
from cappy_engine.errors import AdaptError
from cappy_engine.pairs import Pair
from cappy_export.adaptation.examples import Examples, make_examples
from cappy_export.adaptation.shards import Shard

MOST_HELD_OUT = 4096
"""Instructions that are held out at most: more would not tell more, and take time and memory."""
ROWS_AT_A_TIME = 1024
NUMBERS = 2**64

Kept = tuple[int, int, Pair, float]
"""An example that may be held out: its shard, its place in it, its pair and its label."""


@dataclass(frozen=True)
class Scan:
    """Hold what is known of all examples: how many are to train on, and which are held out.

    Those of instructions whose number is at most `threshold` are held out. `digest` is of all examples, and `digests`
    are those of the shards. `again` counts the pairs of the separate held-out files that are also in the training data.
    """

    examples: int
    held_out: Examples
    threshold: int
    digest: str
    again: int = 0
    digests: tuple[str, ...] = ()


class RowDigest:
    """Makes a digest of a shard's examples while they are read.

    >>> found = RowDigest()
    >>> found.add(("Is the sky blue?", "Yes"), 1.0)
    >>> len(found.digest())
    64
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, pair: Pair, label: float) -> None:
        """Add the next example."""
        self._hash.update(json.dumps([pair, label]).encode())

    def digest(self) -> str:
        """Give the digest of the examples so far, as hexadecimal digits."""
        return self._hash.hexdigest()


@dataclass
class Counted:
    """What one process found in its shards: (rows, digest) of each, and the instructions with the smallest numbers.

    `again` are the pairs that are among those held `apart`, in files of their own.
    """

    apart: frozenset[Pair] = frozenset()
    shards: dict[int, tuple[int, str]] = field(default_factory=dict)
    smallest: dict[int, list[Kept]] = field(default_factory=dict)
    has_more: bool = False
    again: set[Pair] = field(default_factory=set)


def number_of(instruction: str, seed: int) -> int:
    """Give an instruction its number, -2**63 to 2**63 - 1: as good as random, and the same wherever it stands.

    >>> number_of("Is the sky blue?", 0) == number_of("Is the sky blue?", 0)
    True
    """
    digest = hashlib.blake2b(instruction.encode(), digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "big", signed=True)


def count(shards: Sequence[Shard], mine: Iterable[int], *, seed: int, found: Counted) -> Iterator[None]:
    """Read the shards with the numbers `mine` into `found`; pauses after every thousand rows.

    >>> for _ in count(shards, [0], seed=0, found=Counted()):
    ...     pass

    Raises AdaptError for a row that is not an example.
    """
    heap: list[int] = []  # the kept numbers, negated: the largest is on top
    for shard in mine:
        digest, rows = RowDigest(), 0
        with contextlib.closing(shards[shard].read(Position())) as labelled:  # type: ignore[type-var]
            for pair, label, _ in labelled:
                digest.add(pair, label)
                if pair in found.apart:
                    found.again.add(pair)
                _keep(found, heap, number_of(pair[0], seed), (shard, rows, pair, label))
                rows += 1
                if rows % ROWS_AT_A_TIME == 0:
                    yield
        found.shards[shard] = (rows, digest.digest())
    yield


def choose(parts: Sequence[Counted], fraction: float, *, source: str) -> Scan:
    """Put together what all processes found, and hold out about `fraction` of the instructions.

    >>> scan = choose([found], 0.02, source="train.jsonl")

    The number of instructions is exact up to MOST_HELD_OUT, and else estimated by how close the smallest numbers are.
    Raises AdaptError without examples, and if holding out leaves none to train on.
    """
    shards = dict(sorted(each for part in parts for each in part.shards.items()))
    rows = sum(count for count, _ in shards.values())
    if not rows:
        raise AdaptError(f"{source} holds no examples")
    digests = tuple(found for _, found in shards.values())
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    smallest: dict[int, list[Kept]] = {}
    for part in parts:
        for number, kept in part.smallest.items():
            smallest.setdefault(number, []).extend(kept)
    numbers = sorted(smallest)[:MOST_HELD_OUT]
    is_all = len(smallest) <= MOST_HELD_OUT and not any(part.has_more for part in parts)
    instructions = len(numbers) if is_all else (len(numbers) - 1) * NUMBERS // (numbers[-1] + NUMBERS // 2)
    wanted = math.ceil(fraction * instructions)
    if is_all and wanted >= instructions:
        raise AdaptError(
            f"holding out {fraction:g} of {instructions} instructions leaves none to train on; give more instructions, "
            "a file to measure on with --held-out, or --held-out-fraction 0 to measure nothing"
        )
    chosen = numbers[:wanted]
    held_out = sorted(kept for number in chosen for kept in smallest[number])
    threshold = chosen[-1] if chosen else -NUMBERS
    examples = make_examples([pair for _, _, pair, _ in held_out], [label for *_, label in held_out])
    again = set().union(*(part.again for part in parts))
    return Scan(rows - len(held_out), examples, threshold, digest, len(again), digests)


def _keep(found: Counted, heap: list[int], number: int, example: Kept) -> None:
    """Keep an example if its instruction is among those with the smallest numbers."""
    if number in found.smallest:
        found.smallest[number].append(example)
    elif len(heap) < MOST_HELD_OUT or number < -heap[0]:
        found.smallest[number] = [example]
        heapq.heappush(heap, -number)
        if len(heap) > MOST_HELD_OUT:
            del found.smallest[-heapq.heappop(heap)]
            found.has_more = True
    else:
        found.has_more = True
