"""Combine sessions: one for each bucket, and one for each GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from cappy_engine.errors import DeviceUnavailable, ScoringError
from cappy_engine.forking import tell_after_fork
from cappy_engine.session import Inputs, Session


class BucketedSession:
    """One session for each bucket, with a guard: a shape that no engine was built for would stall for minutes."""

    def __init__(self, sessions: Mapping[int, Session], max_rows: Mapping[int, int], *, device: str) -> None:
        self.device = device
        self._sessions = dict(sessions)
        self._max_rows = dict(max_rows)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Score one batch on the engine of its length; ScoringError where there is none, or it takes fewer rows."""
        rows, length = inputs["input_ids"].shape
        if length not in self._sessions or rows > self._max_rows[length]:
            shapes = ", ".join(f"{count} x {bucket}" for bucket, count in self._max_rows.items())
            raise ScoringError(
                f"no engine takes {rows} x {length} tokens; there are engines for up to {shapes}: score with the "
                "scorer's own max_batch_tokens"
            )
        return self._sessions[length].run(inputs)


class SharedSession:
    """The same model on several GPUs, by their numbers: each run takes a free one, and waits if there is none."""

    def __init__(self, sessions: Mapping[int, Session], *, device: str) -> None:
        self.device = device
        self._sessions = dict(sessions)
        self.after_fork()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Set all GPUs free: in a forked child, the threads that took one are not there to give it back."""
        self._changed, self._free = threading.Condition(), list(self._sessions)

    @contextlib.contextmanager
    def hold(self, gpu: int | None = None) -> Iterator[Session]:
        """Keep a GPU for all runs of a block: whatever is asked after a failure, the same one answers.

        It is the one that is free for longest, or `gpu`, once it is free.

        >>> with shared.hold() as session:
        ...     scores = session.run(inputs)
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free if gpu is None else gpu in self._free)
            taken = self._free[0] if gpu is None else gpu
            self._free.remove(taken)
        try:
            with naming_gpu(taken):
                yield self._sessions[taken]
        finally:
            with self._changed:
                self._free.append(taken)
                self._changed.notify_all()

    def each(self) -> list[Session]:
        """List a session for every GPU, which waits until that one is free.

        >>> [session.run(inputs) for session in shared.each()]
        """
        return [_OneGpu(self, gpu) for gpu in self._sessions]

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Score one batch on a GPU that is free; what it raises goes on: no other GPU tries again."""
        with self.hold() as session:
            return session.run(inputs)


class _OneGpu:
    """Runs on one GPU of a SharedSession, and waits until that one is free."""

    def __init__(self, shared: SharedSession, gpu: int) -> None:
        self.device = shared.device
        self._shared = shared
        self._gpu = gpu

    def hold(self) -> contextlib.AbstractContextManager[Session]:
        return self._shared.hold(self._gpu)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        with self.hold() as session:
            return session.run(inputs)


@contextlib.contextmanager
def naming_gpu(gpu: int) -> Iterator[None]:
    """Name the GPU in the errors of a block, but for those of a pair.

    >>> with naming_gpu(1):
    ...     session.run(inputs)
    """
    try:
        yield
    except (DeviceUnavailable, ScoringError) as error:
        if getattr(error, "index", None) is not None:
            raise
        raise type(error)(f"GPU {gpu}: {error}") from error
