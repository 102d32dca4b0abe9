"""Scores with our engine as `Scorer.open` opens a bundle; nothing is computed for padding.

Without an answer of `cappy tune`: a result is of the defaults, whatever was tuned on the machine where it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from cappy_bench.peers.peer import Model, Pair, Scores
from cappy_bench.peers.worker import serve
from cappy_engine.bundle import open_bundle
from cappy_engine.cpu.execution import Execution, choose_execution
from cappy_engine.cpu.kernels import choose_kernels
from cappy_engine.options import Mode, Precision
from cappy_engine.scorer import Scorer


def default_execution(bundle: Path, precision: str, threads: int) -> Execution:
    """Choose the mode and the size of batches as `Scorer.open` does where nothing was tuned.

    >>> default_execution(EMBEDDED, "int8", 2).mode
    'both'
    """
    opened = open_bundle(bundle)
    sizes = [opened.manifest.files[file].size_bytes for file in opened.model_files(precision)]
    return choose_execution("auto", threads=threads, model_bytes=sum(sizes), tuned=None, max_batch_tokens=None)


def default_settings(bundle: Path, precision: str, threads: int) -> dict[str, Any]:
    """Tell a runner's kernels, its mode, the reason for the mode, and its batch size.

    >>> default_settings(EMBEDDED, "int8", 2)["kernels"]
    'avx512'
    """
    execution = default_execution(bundle, precision, threads)
    return {
        "kernels": choose_kernels(open_bundle(bundle), precision).told,
        "mode": execution.mode,
        "mode_reason": execution.reason,
        "max_batch_tokens": execution.max_batch_tokens,
        "tuned": False,
    }


class CappyRunner:
    """Our scorer, with the tokens counted."""

    def __init__(self, model: Model, precision: str) -> None:
        self.computed_tokens = 0
        execution = default_execution(model.bundle, precision, model.threads)
        self._scorer = Scorer.open(
            model.bundle,
            device="cpu",
            precision=cast(Precision, precision),
            threads=model.threads,
            mode=cast(Mode, execution.mode),
            max_batch_tokens=execution.max_batch_tokens,
        )
        info = self._scorer.info
        self.settings = {
            "kernels": info.kernels,
            "mode": info.mode,
            "mode_reason": execution.reason,
            "max_batch_tokens": info.max_batch_tokens,
            "tuned": False,
        }

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
