"""A sampler without an LLM: it answers with what it was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cappy_bench.candidates.decodings import Candidates, Decoding, Sample
from cappy_engine.errors import SampleError


@dataclasses.dataclass
class Echo:
    """Answers with the instruction, the decoding and the seed; fails at the instruction `stop`."""

    stop: str | None = None
    error: BaseException = dataclasses.field(default_factory=lambda: SampleError("stopped"))
    facts: dict[str, Any] = dataclasses.field(default_factory=lambda: {"model": "echo", "limits": {"new": 3}})
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: {"echo": "1"})
    name: str = "echo"
    asked: list[str] = dataclasses.field(default_factory=list)

    def check(self, instructions: Sequence[str], decodings: Sequence[Decoding]) -> None:
        if "refused" in instructions:
            raise SampleError(f"instruction {instructions.index('refused') + 1} is too long")

    def sample(
        self, instructions: Sequence[str], decodings: Sequence[Decoding], *, seed: int, first: int = 1
    ) -> list[Candidates]:
        if self.stop in instructions:
            raise self.error
        self.asked += instructions
        return [
            Candidates(
                tuple(
                    Sample(f"{text}{seed} {place}" if place else "", each.name, -1.5 - place, 3, place == 1)
                    for each in decodings
                    for place in range(each.count)
                ),
                text.strip().endswith("4"),
            )
            for text in instructions
        ]
