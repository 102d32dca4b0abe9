"""Runs one runner in a process of its own, and answers one JSON line for each JSON line on its standard input.

    python -m cappy_bench.peers.worker MODULE PRECISION MODEL     MODEL: cappy_bench.peers.peer.Model as JSON

    {"do": "prepare"}                                 {"seconds": 1.5}
    {"do": "open"}                                    {}
    {"do": "versions", "packages": [...]}             {"versions": {"torch": "2.13.0"}}
    {"do": "token_ids", "pairs": [[a, b], ...]}       {"token_ids": [[0, 5, ...], ...]}
    {"do": "score", "requests": [[[a, b], ...], ...], "pad_to": null}
                                                      {"seconds": [...], "scores": [[...], ...],
                                                       "computed_tokens": 96, "peak_bytes": 123456}

Each request of `score` is one call of the runner, timed alone. A failure answers {"error": "..."}. What the tool itself
prints goes to standard error. A runner for another language answers the same lines.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from cappy_bench.peers.peer import Model, Runner

Message = dict[str, Any]


class Worker:
    """One runner's module, and the runner once it is open."""

    def __init__(self, module: str, precision: str, model: Model) -> None:
        self._module_name, self._precision, self._model = module, precision, model
        self._runner: Runner | None = None

    def answer(self, message: Message) -> Message:
        """Do what the message asks for."""
        if message["do"] == "prepare":
            return self._prepare()
        if message["do"] == "open":
            self._runner = self._module().open_runner(self._model, self._precision)
            return {}
        if message["do"] == "versions":
            return {"versions": {name: metadata.version(name) for name in message["packages"]}}
        if self._runner is None:
            raise RuntimeError("the runner is not open")
        if message["do"] == "token_ids":
            return {"token_ids": self._runner.token_ids([(first, second) for first, second in message["pairs"]])}
        if message["do"] == "score":
            return _score(self._runner, message)
        raise ValueError(f"unknown message {message['do']!r}")

    def _prepare(self) -> Message:
        started = time.perf_counter()
        prepare = getattr(self._module(), "prepare", None)
        if prepare is not None:
            prepare(self._model, self._precision)
        return {"seconds": time.perf_counter() - started}

    def _module(self) -> ModuleType:
        return import_module(f"cappy_bench.peers.{self._module_name}")


def _score(runner: Runner, message: Message) -> Message:
    requests = [[(first, second) for first, second in pairs] for pairs in message["requests"]]
    forget_peak()
    before, seconds, scores = runner.computed_tokens, [], []
    for pairs in requests:
        started = time.perf_counter()
        found = runner.score(pairs, pad_to=message["pad_to"])
        seconds.append(time.perf_counter() - started)
        scores.append([float(score) for score in found])
    after = runner.computed_tokens
    computed = None if before is None or after is None else after - before
    return {"seconds": seconds, "scores": scores, "computed_tokens": computed, "peak_bytes": peak_bytes()}


def forget_peak() -> None:
    """Start a new peak of resident memory, where the system can (Linux)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def peak_bytes() -> int:
    """The most memory that was resident since `forget_peak` (elsewhere than on Linux: since the process began)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str]) -> None:
    module, precision, model = arguments
    values = json.loads(model)
    checkpoint, bundle, folder = (Path(values.pop(name)) for name in ("checkpoint", "bundle", "folder"))
    worker = Worker(module, precision, Model(checkpoint, bundle, folder, **values))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints must not come between the answers
        for line in sys.stdin:
            try:
                answer = worker.answer(json.loads(line))
            except Exception as error:  # whatever a tool raises is this runner's result
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
