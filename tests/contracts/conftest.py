"""Give the tests between rooms a checkpoint and its bundle: a contract holds of what is made now."""

from __future__ import annotations

from tests.support.cores import one_core
from tests.support.exported import bundle, checkpoint
from tests.support.preloaded import preloaded

__all__ = ["bundle", "checkpoint", "one_core", "preloaded"]
