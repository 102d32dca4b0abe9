"""How an LLM is asked for candidates, and what it gives back: plain values and the seam between LLMs and files.

The five decodings of Cappy's BIG-Bench protocol (arXiv 2311.06720, section 4.2) give 17 candidates: one by beam search
and four by each kind of sampling. Knows nothing of any LLM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from cappy_engine.errors import SampleError


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """`count` candidates by one way of decoding; `top_k` of None and `top_p` of 1 leave all tokens in."""

    name: str
    count: int
    num_beams: int = 1
    is_sampled: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One candidate.

    `log_likelihood` is the sum of log p over its `tokens` tokens, in nats, under the LLM's own distribution: no
    temperature, no top-k. Both are None where an LLM does not tell. `is_cut`: it was stopped before its end.
    """

    text: str
    decoding: str
    log_likelihood: float | None
    tokens: int | None
    is_cut: bool


@dataclass(frozen=True)
class Candidates:
    """The samples for one instruction, decoding by decoding; `is_prompt_cut`: the LLM saw only a part of it."""

    samples: tuple[Sample, ...]
    is_prompt_cut: bool = False


class Sampler(Protocol):
    """An LLM that gives candidates.

    `facts` are all that decides the candidates, as JSON can hold it: the model, its commit, the dtype, limits.
    `versions` may decide their last bits: packages and the machine.
    """

    @property
    def name(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def versions(self) -> Mapping[str, str]: ...

    def check(self, instructions: Sequence[str], decodings: Sequence[Decoding]) -> None:
        """Raise SampleError, before anything is sampled, if that would fail; instructions count from 1."""

    def sample(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int, first: int = 1
    ) -> list[Candidates]:
        """Give candidates for each instruction, in order; equal arguments give equal candidates.

        Errors call the first of the instructions by the number `first`, and decide nothing by it.
        """


PAPER = (
    Decoding(name="beam", count=1, num_beams=4, is_sampled=False),
    Decoding(name="sampling", count=4),
    Decoding(name="temperature", count=4, temperature=0.9),
    Decoding(name="top-k", count=4, top_k=40),
    Decoding(name="top-p", count=4, top_p=0.95),
)
"""The paper's decodings."""

DECODINGS: Mapping[str, Decoding] = MappingProxyType(
    {decoding.name: decoding for decoding in (*PAPER, Decoding(name="greedy", count=1, is_sampled=False))}
)
"""All decodings by name."""

ENDPOINT_DECODINGS = tuple(DECODINGS[name] for name in ("sampling", "temperature", "top-p"))
"""The paper's decodings that every endpoint has."""


def choose_decodings(names: Iterable[str], *, count: int = 4) -> tuple[Decoding, ...]:
    """Look up decodings by name; each that samples gives `count` candidates.

        >>> [decoding.count for decoding in choose_decodings(["greedy", "top-p"], count=2)]
        [1, 2]

    Raises SampleError for unknown names, names given twice, an empty list, and a count below 1.
    """
    names = list(names)
    unknown = [name for name in names if name not in DECODINGS]
    if unknown:
        raise SampleError(f"unknown decoding {', '.join(map(repr, unknown))}; choose from {', '.join(DECODINGS)}")
    if not names or len(set(names)) < len(names):
        raise SampleError(f"choose at least one decoding, and each only once; got {', '.join(names) or 'none'}")
    if count < 1:
        raise SampleError(f"the samples of each decoding must be at least 1, got {count}")
    chosen = [DECODINGS[name] for name in names]
    return tuple(dataclasses.replace(each, count=count) if each.is_sampled else each for each in chosen)


def derive_seed(*parts: int | str) -> int:
    """Derive a seed from `parts`, the same on every machine: 0 to 2**31 - 1, which every server takes.

    >>> derive_seed(0, 8, "top-p")
    1414666695
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1
