"""What a scorer returns for pairs: their scores, and what was done to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cappy_engine.batching import Ids, Scores


@dataclass(frozen=True, eq=False)  # == of arrays is not a bool
class Scored:
    """Scores (n,) float32 in input order, `token_counts` (n,) int64 and `truncated` (n,) bool.

    `without_instruction` are the places of pairs whose instruction is empty. They are scored, but no text was asked
    anything.
    """

    scores: Scores
    token_counts: Ids
    truncated: npt.NDArray[np.bool_]
    without_instruction: tuple[int, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        """Put what several calls returned one after the other. Raises ValueError if there were none.

        >>> Scored.joined([scored, scored]).scores.shape == (2 * len(scored.scores),)
        True
        """
        if not parts:
            raise ValueError("joined needs the scores of at least one call, got none")
        starts = np.cumsum([0, *(len(part.scores) for part in parts)]).tolist()
        return cls(
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.token_counts for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            tuple(start + row for start, part in zip(starts, parts, strict=False) for row in part.without_instruction),
        )

    def remarks(self) -> Iterator[str]:
        """Say how many pairs were truncated or have no instruction, and which is the first.

        >>> list(scorer.score_pairs([("", "Yes")]).remarks())
        ['1 of 1 pairs have an empty instruction, the first is pair 0']
        """
        for places, what in (
            (np.flatnonzero(self.truncated), "were truncated"),
            (self.without_instruction, "have an empty instruction"),
        ):
            if len(places):
                yield f"{len(places)} of {len(self.scores)} pairs {what}, the first is pair {places[0]}"
