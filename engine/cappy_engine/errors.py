"""Define every exception that this project raises on purpose.

CappyError
├── InstallationError        a package is missing, two packages exclude each other, or kernels asked for cannot be used
├── InvalidPair              a pair that cannot be scored; `.index` is its place in the input
├── InvalidLine              a line or row of a file without a usable pair; `.number` counts from 1
├── BundleError              a bundle that is damaged, incomplete, foreign or too new
│   └── PrecisionUnavailable the bundle has no model of the precision asked for
├── DeviceUnavailable        the device asked for cannot be used; nothing falls back
├── OutputError              a file or folder of results cannot be begun, gone on with or finished
├── AdaptError               training cannot start, go on or end as asked; no checkpoint was written
├── BenchmarkError           nothing can be measured as asked, or a file is not a result
├── SampleError              candidates cannot be sampled as asked; what was complete is kept
├── ServingError             a server that cannot begin, or end as it should
│   ├── InvalidRequest       a request that is not what its path takes; `.status` is HTTP's
│   ├── QueueFull            more waits than may; `.retry_seconds` says when to come again
│   ├── QueueClosed          the server stops, or the model's place was taken
│   ├── NotReady             no model is loaded yet
│   ├── DeadlinePassed       a request was not answered in time
│   └── ModelBroken          the model's scores are wrong, or it fails on what it scored before
├── ScoringError             the model failed, or gave no score; `.index` is the pair's place, if one is at fault
└── ExportError              no bundle was written
    ├── CheckpointError      not a checkpoint that can be exported, or not a safe one
    ├── GraphError           the ONNX graph is not what it must be
    └── ParityError          the scores are too far from PyTorch's; `.report` says how far
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

KNOWN = frozenset({"cappy_engine", "numpy", "onnxruntime", *sys.stdlib_module_names})
"""Whose types of errors say that something failed here: this package's, and those of what it calls."""


def install_hint(extras: str) -> str:
    """Say how to install the package with `extras`; it is not on PyPI, so from a clone.

    >>> install_hint("cpu,export")
    "in a clone of cappy-engine, run: pip install -c constraints.txt '.[cpu,export]'"
    """
    return f"in a clone of cappy-engine, run: pip install -c constraints.txt '.[{extras}]'"


def is_failure(error: BaseException) -> bool:
    """Tell if an error is an Exception or a panic in Rust. Python does not count a panic as an Exception.

    >>> is_failure(ValueError()), is_failure(KeyboardInterrupt())
    (True, False)
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def is_callers(error: BaseException) -> bool:
    """Tell if a signal handler of the caller's raised the error.

    Python runs such a handler in the midst of any function. Celery and RQ end a task by such an error if the task takes
    too long: the error must reach the caller as it is. Its type is the caller's, or it went through a handler that is
    set now.

    >>> is_callers(ValueError())
    False
    """
    if type(error).__module__.partition(".")[0] not in KNOWN and not isinstance(error, (OSError, ImportError)):
        return True
    handlers, trace = set(_handlers()), error.__traceback__
    while trace is not None and trace.tb_frame.f_code not in handlers:
        trace = trace.tb_next
    return trace is not None


def _handlers() -> Iterator[CodeType]:
    """Give the code of all signal handlers: of functions, methods, partials, and objects that can be called."""
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        if not callable(handler):  # none is set
            continue
        handler = getattr(handler, "func", handler)
        for each in (getattr(handler, "__func__", handler), type(handler).__call__):
            if isinstance(code := getattr(each, "__code__", None), CodeType):
                yield code


def reason_of(error: BaseException) -> str:
    """Say why a file or address cannot be used, where the message names it: the system's words, without its number.

    >>> reason_of(FileNotFoundError(2, "No such file or directory", "pairs.jsonl"))
    'No such file or directory'
    """
    return getattr(error, "strerror", None) or str(error)


def is_shortage(error: BaseException | None) -> bool:
    """Tell whether the process lacks memory, open files or the like: what lies on the disk may be right.

    >>> is_shortage(OSError(errno.EMFILE, "Too many open files"))
    True
    """
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def message_of(error: BaseException) -> str:
    """Say what failed: an error's message, or the file that the system refused, and why.

    >>> message_of(FileNotFoundError(2, "No such file or directory", "pairs.jsonl"))
    'pairs.jsonl: No such file or directory'

    A copy or a rename has two files. Both are named, since the system does not say which one it refused.
    """
    paths = [getattr(error, name, None) for name in ("filename", "filename2")]
    named = " to ".join(
        os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path) for path in paths if path is not None
    )
    return f"{named}: {reason_of(error)}" if named else reason_of(error)


class CappyError(Exception):
    """Base of all; catch it to catch everything that this project raises on purpose."""


class InstallationError(CappyError):
    """A package is missing, or two installed packages exclude each other.

    Also raised if kernels that were asked for by name cannot be used.
    """


class InvalidPair(CappyError, ValueError):
    """A pair cannot be scored.

    `index` is the pair's place in the sequence that was passed, counted from 0.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)  # what pickle makes the error from again
        self.index = index
        self.problem = problem

    def __str__(self) -> str:
        return f"pair {self.index}: {self.problem}"


class InvalidLine(CappyError, ValueError):
    """A line of a file (or a row of a table) holds no usable pair.

    `number` counts from 1; `unit` says what it counts; `path` is the file, where there are several.
    """

    def __init__(self, number: int, problem: str, unit: str = "line", path: str = "") -> None:
        super().__init__(number, problem, unit, path)
        self.number = number
        self.problem = problem
        self.unit = unit
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}{', ' if self.path else ''}{self.unit} {self.number}: {self.problem}"


class BundleError(CappyError):
    """A bundle is damaged, incomplete, too new, or not a bundle at all.

    A bundle is too new if a newer version wrote it.
    """


class PrecisionUnavailable(BundleError):
    """The bundle has no model of the precision asked for."""


class DeviceUnavailable(CappyError):
    """The device asked for cannot be used here. Nothing falls back to another one."""


class ScoringError(CappyError):
    """ONNX Runtime failed while scoring, or returned something that is not a score (NaN, infinity).

    `index` is the place of the pair that fails in the model, from 0; None where no single pair is at fault.
    """

    def __init__(self, problem: str, index: int | None = None) -> None:
        super().__init__(problem, index)
        self.problem = problem
        self.index = index

    def __str__(self) -> str:
        return self.problem if self.index is None else f"pair {self.index}: {self.problem}"


class ServingError(CappyError):
    """A server cannot begin, cannot score a request, or did not end as it should."""


class InvalidRequest(ServingError, ValueError):
    """A request is not what its path takes; `status` is HTTP's (400 for what is not JSON, 422 for a wrong field...)."""

    def __init__(self, problem: str, status: int = 422) -> None:
        super().__init__(problem, status)
        self.problem = problem
        self.status = status

    def __str__(self) -> str:
        return self.problem


class QueueFull(ServingError):
    """A request does not fit into the queue; after `retry_seconds` it is worth sending again."""

    def __init__(self, problem: str, retry_seconds: int) -> None:
        super().__init__(problem, retry_seconds)
        self.problem = problem
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        return self.problem


class QueueClosed(ServingError):
    """The queue takes no more requests: the server stops, or another model took this one's place."""


class NotReady(ServingError):
    """The server has loaded no model yet."""


class DeadlinePassed(ServingError):
    """A request was not answered in the time that it had."""


class ModelBroken(ServingError):
    """The model gives wrong scores, or fails on pairs that it scored before."""


class OutputError(CappyError):
    """A file or folder of results cannot be begun, gone on with or finished; what was complete is kept."""


class AdaptError(CappyError):
    """Training cannot start, go on or end as it was asked to; no checkpoint was written."""


class BenchmarkError(CappyError):
    """Nothing can be measured as asked, or a file is not a benchmark's result."""


class SampleError(CappyError):
    """Candidates cannot be sampled as asked; what was complete is kept."""


class ExportError(CappyError):
    """The export failed and no bundle was written."""


class CheckpointError(ExportError):
    """The source is not a checkpoint that can be exported and is safe to load."""


class GraphError(ExportError):
    """The ONNX graph is not what it must be: axes, operators or fusions."""


class ParityError(ExportError):
    """The scores are further from PyTorch's than the limits allow.

    `report` is the parity report (see `cappy_export.proof.parity`).
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message, report)
        self.report = report

    def __str__(self) -> str:
        return str(self.args[0])
