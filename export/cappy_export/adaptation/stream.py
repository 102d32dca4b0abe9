"""Give training its steps from a stream of shards, from any step on.

The memory is constant. The shuffle has two levels: the order of the shards is drawn anew for every epoch, and so is the
order of the groups within a window. A window is some ten thousand examples that follow each other in the order of the
shards. Examples that fit into one window are shuffled as a whole. Tokens are made once for each window, in a thread
that works ahead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_engine.batching import Batch, EncodedPairs
from cappy_engine.bulk.formats.entries import Position
from cappy_engine.errors import AdaptError
from cappy_engine.inputs import attention_mask, pad
from cappy_engine.pairs import Pair
from cappy_export.adaptation.examples import Examples
from cappy_export.adaptation.scanning import RowDigest, number_of
from cappy_export.adaptation.schedule import Rows, count_steps, plan_window
from cappy_export.adaptation.shards import Labelled, Shard

ENCODED_AT_A_TIME = 1024

BEGIN = Position()
Encode = Callable[[list[Pair]], EncodedPairs]


@dataclass(frozen=True)
class Cursor:
    """Say where a window begins: its epoch, its number, the place of its first shard in the epoch's order, and where.

    >>> Cursor.parse(Cursor(epoch=1).document()) == Cursor(epoch=1)
    True
    """

    epoch: int = 0
    window: int = 0
    shard: int = 0
    position: Position = BEGIN

    def document(self) -> dict[str, Any]:
        """Write it for a file of JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Cursor:
        """Read what `document` wrote. Raises TypeError or KeyError for anything else."""
        return cls(**{**document, "position": Position(**document["position"])})


@dataclass(frozen=True)
class Window:
    """Hold n examples as tokens.

    `tokens` are all of them, one example after the other, int32, and `types` their types, int8, if the model has any.
    `lengths` and `groups` are (n,) int64, `labels` (n,) float32, `truncated` (n,) bool.
    """

    tokens: npt.NDArray[np.int32]
    types: npt.NDArray[np.int8] | None
    lengths: Rows
    truncated: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.float32]
    groups: Rows

    def __len__(self) -> int:
        return len(self.lengths)

    def inputs(self, rows: Rows, length: int, *, pad_token_id: int) -> dict[str, Rows]:
        """Make a model's inputs of the examples at `rows`, padded: each (batch, length) int64.

        >>> window.inputs(np.array([0]), 16, pad_token_id=1)["input_ids"].shape
        (1, 16)
        """
        ends = self._ends[rows]
        starts, batch = ends - self.lengths[rows], Batch(np.arange(len(rows)), length)
        parts = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        found = {
            "input_ids": pad([self.tokens[part] for part in parts], batch, value=pad_token_id),  # type: ignore[misc]
            "attention_mask": attention_mask(self.lengths[rows], batch),
        }
        if self.types is not None:
            found["token_type_ids"] = pad([self.types[part] for part in parts], batch, value=0)  # type: ignore[misc]
        return found

    def digest(self) -> str:
        """Compute a digest of the tokens and labels.

        >>> len(window.digest())
        16
        """
        found = hashlib.sha256()
        for each in (self.tokens, self.lengths, self.labels, self.groups):
            found.update(each.tobytes())
        return found.hexdigest()[:16]

    @cached_property
    def _ends(self) -> Rows:
        return np.cumsum(self.lengths)


@dataclass
class Building:
    """Makes a window of examples that come one by one.

    >>> building = Building(encoder.encode, has_types=False)
    >>> building.add(("Is the sky blue?", "Yes"), 1.0, 7)
    >>> len(building.window())
    1
    """

    encode: Encode
    has_types: bool
    pairs: list[Pair] = field(default_factory=list)
    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)
    types: list[npt.NDArray[np.int8]] = field(default_factory=list)
    lengths: list[Rows] = field(default_factory=list)
    truncated: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, pair: Pair, label: float, group: int) -> None:
        """Put an example behind the others."""
        self.pairs.append(pair)
        self.labels.append(label)
        self.groups.append(group)
        if len(self.pairs) == ENCODED_AT_A_TIME:
            self._encode()

    def window(self) -> Window:
        """Give the window of all examples."""
        self._encode()
        return Window(
            np.concatenate([*self.tokens, np.zeros(0, np.int32)]),
            np.concatenate([*self.types, np.zeros(0, np.int8)]) if self.has_types else None,
            np.concatenate([*self.lengths, np.zeros(0, np.int64)]),
            np.concatenate([*self.truncated, np.zeros(0, np.bool_)]),
            np.array(self.labels, dtype=np.float32),
            np.array(self.groups, dtype=np.int64),
        )

    def _encode(self) -> None:
        if self.pairs:
            encoded = self.encode(self.pairs)
            self.tokens.append(np.concatenate(encoded.token_ids).astype(np.int32))
            if self.has_types:
                self.types.append(np.concatenate(encoded.type_ids).astype(np.int8))
            self.lengths.append(encoded.lengths)
            self.truncated.append(encoded.truncated)
            self.pairs = []


def encode_all(examples: Examples, encode: Encode, *, has_types: bool) -> Window:
    """Make one window of examples that are in memory.

    >>> len(encode_all(examples, encoder.encode, has_types=False)) == len(examples)
    True
    """
    building = Building(encode, has_types)
    for pair, label, group in zip(examples.pairs, examples.labels.tolist(), examples.groups.tolist(), strict=True):
        building.add(pair, label, group)
    return building.window()


@dataclass(frozen=True)
class Step:
    """A step: its number from 1, its `rows` in a window, and where the window of the next step begins."""

    number: int
    window: Window
    rows: Rows
    next: Cursor


@dataclass(frozen=True)
class Stream:
    """Reads `examples` examples from shards, again in every epoch.

    Instructions whose number is at most `threshold` are left out. A window has `window` examples, a multiple of
    `batch_size`. `digests` tell what the shards held when the examples were counted.

        >>> stream = Stream(shards, encoder.encode, scan.examples, scan.threshold, window=65536, batch_size=128, seed=0)
    """

    shards: Sequence[Shard]
    encode: Encode
    examples: int
    threshold: int
    window: int
    batch_size: int
    seed: int
    has_types: bool = False
    digests: Sequence[str] = ()

    @property
    def window_rows(self) -> int:
        """Count the examples of a full window: whole steps."""
        return max(1, self.window // self.batch_size) * self.batch_size

    def windows(self, begin: Cursor, epochs: int) -> Iterator[tuple[Cursor, Cursor, Window]]:
        """Yield the windows from `begin` on, each with its cursor and the next window's.

        Raises AdaptError if the number of examples has changed, or the examples of a shard.
        """
        for epoch in range(begin.epoch, epochs):
            at = begin if epoch == begin.epoch else Cursor(epoch)
            building, rows = self._new(), at.window * self.window_rows
            for place, each in self._labelled(at):
                group = number_of(each.pair[0], self.seed)
                if group <= self.threshold:
                    continue
                building.add(each.pair, each.label, group)
                rows += 1
                if len(building.labels) == self.window_rows:
                    behind = Cursor(epoch, at.window + 1, place, each.position() or Position())
                    yield at, behind, building.window()
                    at, building = behind, self._new()
            if rows != self.examples:
                raise AdaptError(
                    f"the examples have changed while they were read: there are {rows}, and were {self.examples}"
                )
            if building.labels:
                yield at, Cursor(epoch + 1), building.window()

    def steps(self, windows: Iterator[tuple[Cursor, Cursor, Window]], *, done: int) -> Iterator[Step]:
        """Yield the steps of `windows` but those that are `done`.

        >>> [step.number for step in stream.steps(stream.windows(Cursor(), 1), done=3)][:2]
        [4, 5]
        """
        of_epoch = count_steps(self.examples, batch_size=self.batch_size, epochs=1)
        for at, behind, window in windows:
            before = at.epoch * of_epoch + at.window * (self.window_rows // self.batch_size)
            planned = plan_window(
                window.lengths,
                window.groups,
                batch_size=self.batch_size,
                seed=self.seed,
                epoch=at.epoch,
                window=at.window,
            )
            for place, rows in enumerate(planned, start=1):
                if before + place > done:
                    yield Step(before + place, window, rows, behind if place == len(planned) else at)

    def _labelled(self, at: Cursor) -> Iterator[tuple[int, Labelled]]:
        """Yield an epoch's examples from a cursor on, each with the place of its shard.

        Places count the shards in the epoch's order.
        """
        order = np.random.default_rng([self.seed, at.epoch, 0, 1]).permutation(len(self.shards))
        for place in range(at.shard, len(order)):
            start = at.position if place == at.shard else Position()
            digest = RowDigest()
            with contextlib.closing(self.shards[order[place]].read(start)) as rows:
                for each in rows:
                    digest.add(each.pair, each.label)
                    yield place, each
            if self.digests and start == BEGIN and digest.digest() != self.digests[order[place]]:
                raise AdaptError(
                    f"the examples have changed while they were read: {self.shards[order[place]].name} does not hold "
                    "what it did; start anew with --force"
                )

    def _new(self) -> Building:
        return Building(self.encode, self.has_types)
