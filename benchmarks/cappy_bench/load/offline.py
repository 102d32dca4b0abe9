"""Scores the load with `Scorer.score`, without a server: the figures and the scores that a server's are held against.

It runs in a process of its own, with the options that the server chose, and answers lines of JSON:

    python -m cappy_bench.load.offline BUNDLE OPTIONS              OPTIONS: ScorerOptions as JSON

    {"do": "open", "requests": [[[a, b], ...], ...]}   {"scores": [[...], ...]}
    {"do": "each", "places": [0, 1]}                   {"seconds": [...]}      each request in one call
    {"do": "all", "places": [0, 1]}                    {"seconds": 0.5}        all their pairs in one call
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy_bench.load.mix import Load
from cappy_bench.peers.peer import Pair
from cappy_bench.peers.process import RunnerFailed, WorkerProcess
from cappy_bench.peers.worker import answer_lines
from cappy_engine.errors import BenchmarkError
from cappy_engine.options import ScorerOptions
from cappy_engine.scorer import Scorer


class Offline:
    """The process that scores without a server, and what it scored: `expected` has the scores of each request."""

    def __init__(self, bundle: Path, options: ScorerOptions, load: Load, *, log: Path) -> None:
        command = [sys.executable, "-P", "-m", "cappy_bench.load.offline", str(bundle), options.to_json()]
        self._worker = WorkerProcess(command, environment={}, log=log)
        scores = self._ask({"do": "open", "requests": load.requests})["scores"]
        self.expected: list[npt.NDArray[np.float64]] = [np.array(row, dtype=np.float64) for row in scores]

    def each(self, places: Sequence[int]) -> list[float]:
        """Score requests one after another; the seconds of each call. Raises BenchmarkError if the process failed.

        >>> offline.each([0, 1])
        [0.011, 0.042]
        """
        return list(self._ask({"do": "each", "places": list(places)})["seconds"])

    def all(self, places: Sequence[int]) -> float:
        """Score the pairs of requests in one call; its seconds. Raises BenchmarkError if the process failed.

        >>> offline.all([0, 1])
        0.049
        """
        return float(self._ask({"do": "all", "places": list(places)})["seconds"])

    def close(self) -> None:
        """End the process.

        >>> offline.close()
        """
        self._worker.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._worker.ask(message)
        except RunnerFailed as error:
            self._worker.close()
            raise BenchmarkError(f"the load cannot be scored without a server: {error}") from error


class _Scoring:
    """Answers the messages, in the process of its own."""

    def __init__(self, bundle: Path, options: ScorerOptions) -> None:
        self._scorer = Scorer.open_with(bundle, options)
        self._requests: list[list[Pair]] = []

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "open":
            self._requests = [[(first, second) for first, second in request] for request in message["requests"]]
            return {"scores": [[float(score) for score in self._scorer.score(pairs)] for pairs in self._requests]}
        asked = [self._requests[place] for place in message["places"]]
        if message["do"] == "each":
            return {"seconds": [self._seconds(pairs) for pairs in asked]}
        return {"seconds": self._seconds([pair for pairs in asked for pair in pairs])}

    def _seconds(self, pairs: Sequence[Pair]) -> float:
        begin = time.perf_counter()
        self._scorer.score(pairs)
        return time.perf_counter() - begin


if __name__ == "__main__":
    bundle, options = sys.argv[1:]
    answer_lines(_Scoring(Path(bundle), ScorerOptions.from_json(options)).answer)
