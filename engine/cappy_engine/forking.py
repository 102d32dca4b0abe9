"""Tell objects that the process was forked: the child has one thread, and any lock may be held for ever.

Each object knows what to do then: make its locks and pools anew, open its session again. This knows none of them.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """An object that is told."""

    def after_fork(self) -> None:
        """Become usable in the child, which has one thread; must not wait for anything."""


def tell_after_fork(thing: Forked) -> None:
    """Call `thing.after_fork()` in every child that is forked while `thing` lives.

    >>> tell_after_fork(scorer)
    """
    _TOLD.add(thing)


def never_free(thing: object) -> None:
    """Keep an object until the process ends. Its destructor never runs, not even at the end.

    The destructor of ONNX Runtime's session waits for its threads, and so for ever in a forked child.

    >>> never_free(session)
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _tell_all() -> None:
    failed: list[Exception] = []
    for thing in list(_TOLD):
        try:
            thing.after_fork()
        except Exception as error:  # the others are told all the same
            failed.append(error)
    if failed:  # Python goes on after it, and shows it (sys.unraisablehook)
        raise ExceptionGroup("some objects do not work in this forked child", failed)


_TOLD: weakref.WeakSet[Forked] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_tell_all)
