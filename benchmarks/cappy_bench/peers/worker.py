"""Runs one runner in a process of its own, which answers lines of JSON.

A runner's module ends by calling `serve`, and is started as a program:

    python -m cappy_bench.peers.NAME [WAY] PRECISION MODEL          MODEL: cappy_bench.peers.peer.Model as JSON

    {"do": "prepare"}                                 {"seconds": 1.5}
    {"do": "open"}                                    {"settings": {"kernels": "avx512"}}
    {"do": "versions", "packages": [...]}             {"versions": {"torch": "2.13.0"}}
    {"do": "token_ids", "pairs": [[a, b], ...]}       {"token_ids": [[0, 5, ...], ...]}
    {"do": "score", "requests": [[[a, b], ...], ...]} {"seconds": [...], "scores": [[...], ...],
                                                       "computed_tokens": 96, "peak_bytes": 123456}

Settings are what the runner chose by itself, and may be missing. Each request of `score` is one call of the runner,
timed alone. A failure answers {"error": "..."}. What the tool itself prints goes to standard error. A runner in another
language answers the same lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

from cappy_bench.memory import forget_peak, peak_bytes
from cappy_bench.peers.peer import Model, Runner

Message = dict[str, Any]
Open = Callable[[Model, str], Runner]
Prepare = Callable[[Model, str], None]


class Worker:
    """Answers the messages with one tool, and holds its runner once that is open."""

    def __init__(self, model: Model, precision: str, open_runner: Open, prepare: Prepare | None) -> None:
        self._model, self._precision = model, precision
        self._open_runner, self._prepare = open_runner, prepare
        self._runner: Runner | None = None

    def answer(self, message: Message) -> Message:
        """Do what the message asks for."""
        if message["do"] == "prepare":
            started = time.perf_counter()
            if self._prepare is not None:
                self._prepare(self._model, self._precision)
            return {"seconds": time.perf_counter() - started}
        if message["do"] == "open":
            self._runner = self._open_runner(self._model, self._precision)
            return {"settings": getattr(self._runner, "settings", {})}
        if message["do"] == "versions":
            return {"versions": dict(installed(name) for name in message["packages"])}
        if self._runner is None:
            raise RuntimeError("the runner is not open")
        if message["do"] == "token_ids":
            return {"token_ids": self._runner.token_ids([(first, second) for first, second in message["pairs"]])}
        if message["do"] == "score":
            return _score(self._runner, message)
        raise ValueError(f"unknown message {message['do']!r}")


def installed(package: str) -> tuple[str, str]:
    """Name the installed package and its version; the one for GPUs counts too, as it also runs on CPUs.

    Raises importlib.metadata.PackageNotFoundError.

        >>> installed("onnxruntime")
        ('onnxruntime', '1.31.1')
    """
    for name in (package, f"{package}-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    raise metadata.PackageNotFoundError(package)


def serve(open_runner: Open, prepare: Prepare | None = None) -> None:
    """Answer the lines on standard input until it ends.

    The program's last arguments are the precision and the model.

    >>> serve(open_runner, prepare)
    """
    precision, model = sys.argv[-2:]
    answer_lines(Worker(Model.from_json(model), precision, open_runner, prepare).answer)


def answer_lines(answer: Callable[[Message], Message]) -> None:
    """Answer the lines of JSON on standard input until it ends; a failure is an answer, too.

    >>> answer_lines(lambda message: {"seconds": 0.0})
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints must not come between the answers
        for line in sys.stdin:
            try:
                answered = answer(json.loads(line))
            except Exception as error:  # whatever a tool raises is this runner's result
                traceback.print_exc()
                answered = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answered), file=answers, flush=True)


def _score(runner: Runner, message: Message) -> Message:
    requests = [[(first, second) for first, second in pairs] for pairs in message["requests"]]
    forget_peak()
    before, seconds, scores = runner.computed_tokens, [], []
    for pairs in requests:
        started = time.perf_counter()
        found = runner.score(pairs)
        seconds.append(time.perf_counter() - started)
        scores.append([float(score) for score in found])
    after = runner.computed_tokens
    computed = None if before is None or after is None else after - before
    return {"seconds": seconds, "scores": scores, "computed_tokens": computed, "peak_bytes": peak_bytes()}
