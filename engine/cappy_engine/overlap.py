"""Do work beside other work: one thread makes items ahead, another takes them behind. Memory stays bounded.

Queues are SimpleQueues: a signal whose handler raises within a Queue leaves its lock taken, and threads wait for ever.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, Self, TypeVar

from cappy_engine.errors import ScoringError

Item = TypeVar("Item")

POLL_SECONDS = 0.1
"""How soon a thread notices that nobody waits for what it makes."""


class PythonEnding(ScoringError):
    """The main thread has ended: Python waits for the other threads, but starts none. Its pools take no work then.

    Nor does a pool that was closed; Python says of both nearly the same.
    """


class NobodyWaits(BaseException):
    """Ends the work of a thread whose items nobody takes any more. No Exception: those may be ends of an input."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Raise ScoringError where the system has no more threads for this process, or PythonEnding; the block starts one.

    >>> with starting():
    ...     threading.Thread(target=print).start()
    """
    try:
        yield
    except RuntimeError as error:  # Python has no kinds of its own for these
        if "shutdown" in str(error):
            raise PythonEnding(f"no thread can be started: {error}") from error
        raise ScoringError(
            f"no thread can be started: {error}; let this process have more (ulimit -u, or its container's limit of "
            "processes), or open the scorer with fewer threads"
        ) from error


@contextlib.contextmanager
def beside(work: Callable[[], Item]) -> Iterator[Callable[[], Item]]:
    """Do `work` in a thread while the block runs; what it yields waits for the end, and raises an error of the work.

    >>> with beside(files.check) as checked:
    ...     session = open_session(files.path)
    ...     checked()
    """
    done: Future[Item] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # it is raised where the result is used
            done.set_exception(error)

    thread = threading.Thread(target=do, name="cappy-beside")
    result: Callable[[], Item] = done.result
    try:
        try:
            with starting():
                thread.start()
        except PythonEnding:
            result = work  # done when it is waited for
        yield result
    finally:  # also if a signal comes while the thread starts
        if thread.is_alive():
            thread.join()


@contextlib.contextmanager
def ahead(items: Iterator[Item]) -> Iterator[Iterator[Item]]:
    """Have a thread make the next item while this one is used; an error comes after the items before it.

    Two items at most are ready ahead. The thread ends with the block, when its item is made: what takes long calls
    `check_waited_for` meanwhile.

        >>> with ahead(iter([1, 2, 3])) as ready:
        ...     list(ready)
        [1, 2, 3]
    """
    thread = _Ahead(items)
    made, is_refused = thread.made(), False
    try:
        try:
            with starting():
                thread.start()
        except PythonEnding:
            made, is_refused = items, True  # each is made when it is asked for
        yield made
    finally:  # also if a signal comes while the thread starts
        thread.is_over = True
        if thread.is_alive():
            thread.join()
        if is_refused:
            thread.close()


def check_waited_for() -> None:
    """Raise NobodyWaits in a thread of `ahead` whose block has ended. Long loops without an item call it.

    >>> check_waited_for()
    """
    thread = threading.current_thread()
    if isinstance(thread, _Ahead) and thread.is_over:
        raise NobodyWaits


class _Ahead(threading.Thread, Generic[Item]):
    """The thread of `ahead`. It is over when nobody waits for its items."""

    def __init__(self, items: Iterator[Item]) -> None:
        super().__init__(name="cappy-ahead")
        self.is_over = False
        self._items = items
        self._ready: queue.SimpleQueue[tuple[str, Item | BaseException | None]] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._room.put(None)

    def run(self) -> None:
        """Make the items."""
        try:
            while not self.is_over:
                self._put("item", next(self._items))
        except StopIteration:
            self._put("end", None)
        except BaseException as error:  # it is raised where the items are used
            self._put("error", error)
        finally:
            self.close()

    def made(self) -> Iterator[Item]:
        """Take the items, as they are made."""
        while True:
            kind, value = self._ready.get()
            self._room.put(None)
            if kind == "end":
                return
            if isinstance(value, BaseException) and kind == "error":
                raise value
            yield value  # type: ignore[misc]

    def close(self) -> None:
        """End what makes the items; it may hold files."""
        if isinstance(self._items, Generator):
            self._items.close()

    def _put(self, kind: str, value: Item | BaseException | None) -> None:
        while not self.is_over:
            with contextlib.suppress(queue.Empty):
                self._room.get(timeout=POLL_SECONDS)
                self._ready.put((kind, value))
                return


class Behind(Generic[Item]):
    """Calls a function with one item after another in a thread; at most one waits.

    An error is raised by the next call, or at the end of the block, and nothing is done after it. The block ends when
    all is done, also if it ends by an error of its own.

        >>> with Behind(print) as later:
        ...     later("written beside")
        written beside
    """

    def __init__(self, function: Callable[[Item], object]) -> None:
        self._function = function
        self._items: queue.SimpleQueue[tuple[bool, Item | None]] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._room.put(None)
        self._is_over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="cappy-behind")

    def __call__(self, item: Item) -> None:
        self._check()
        self._room.get()
        self._items.put((True, item))

    def __enter__(self) -> Self:
        try:
            with starting():
                self._thread.start()
        except BaseException:  # a signal, too: nobody else would end the thread
            self._is_over = True
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True  # the thread ends by itself, also if Ctrl-C comes while it is waited for
        self._items.put((False, None))  # it need not wait for POLL_SECONDS
        self._thread.join()
        if error is None:
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while not (self._is_over and self._items.empty()):
            try:
                is_item, item = self._items.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if is_item:
                self._room.put(None)
            if is_item and self._error is None:
                try:
                    self._function(item)  # type: ignore[arg-type]
                except BaseException as error:  # it is raised where the items come from
                    self._error = error
