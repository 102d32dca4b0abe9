"""Scores with our engine as `Scorer.open` opens a bundle; nothing is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.worker import serve
from cappy_engine.options import Precision
from cappy_engine.scorer import Scorer


class CappyRunner:
    """Our scorer, with the tokens counted."""

    def __init__(self, model: Model, precision: str) -> None:
        self.computed_tokens = 0
        self._scorer = Scorer.open(
            model.bundle, device="cpu", precision=cast(Precision, precision), threads=model.threads
        )

    def score(self, pairs: Sequence[Pair]) -> Scores:
        """Raw scores of n pairs: (n,) float32, in input order."""
        scored = self._scorer.score_pairs(pairs)
        self.computed_tokens += int(scored.token_counts.sum())
        return scored.scores

    def token_ids(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """The token ids, without padding, that `score` gives the model for each pair."""
        return [row.tolist() for row in self._scorer.tokenizer.encode(pairs).token_ids]


def open_runner(model: Model, precision: str) -> CappyRunner:
    """Open the bundle's model of `precision`."""
    return CappyRunner(model, precision)


if __name__ == "__main__":
    serve(open_runner)
