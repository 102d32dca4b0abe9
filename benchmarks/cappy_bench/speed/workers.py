"""Keeps runners loaded: as many as memory allows, the one unused for longest ends first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from cappy_bench.memory import available_bytes
from cappy_bench.peers.peer import Model, Pair
from cappy_bench.peers.process import RunnerFailed, Start, Worker
from cappy_bench.peers.specs import Spec


class Workers:
    """The loaded runners.

    Each scores `warm_up` before it is timed, and `reserve_bytes` of memory are kept free.
    """

    def __init__(self, model: Model, start: Start, *, warm_up: Sequence[Pair], reserve_bytes: int) -> None:
        self._model, self._start = model, start
        self._warm_up, self._reserve_bytes = warm_up, reserve_bytes
        self._open: dict[str, Worker] = {}  # least recently used first
        self.load_seconds: dict[str, list[float]] = {}

    def get(self, spec: Spec) -> Worker:
        """Return the runner, loaded and warm. Raises RunnerFailed.

        >>> workers.get(SPECS[0]).ask({"do": "score", "requests": [[("Is the sky blue?", "Yes")]]})
        """
        if spec.name in self._open:
            self._open[spec.name] = self._open.pop(spec.name)
            return self._open[spec.name]
        while self._open and self._is_short_of_memory():
            self._open.pop(next(iter(self._open))).close()
        started = time.perf_counter()
        worker = self._start(spec, runner_model(self._model, spec))
        try:
            worker.ask({"do": "open"})
            self.load_seconds.setdefault(spec.name, []).append(time.perf_counter() - started)
            requests = [*([pair] for pair in self._warm_up), self._warm_up]  # one by one, and all at once
            worker.ask({"do": "score", "requests": requests})
        except RunnerFailed:
            worker.close()
            raise
        self._open[spec.name] = worker
        return worker

    def drop(self, spec: Spec) -> None:
        """End a runner that failed.

        >>> workers.drop(SPECS[0])
        """
        if spec.name in self._open:
            self._open.pop(spec.name).close()

    def close(self) -> None:
        """End all runners.

        >>> workers.close()
        """
        while self._open:
            self._open.popitem()[1].close()

    def _is_short_of_memory(self) -> bool:
        available = available_bytes()
        return available is not None and available < self._reserve_bytes


def runner_model(model: Model, spec: Spec) -> Model:
    """Give the runner a folder, which it shares with others of its module.

    >>> runner_model(Model(Path("bundle"), Path("bench"), 2), SPECS[3]).folder
    PosixPath('bench/cappy')
    """
    folder = model.folder / Path(spec.module).stem
    folder.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(model, folder=folder)
