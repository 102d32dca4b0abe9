"""Give the tests between rooms a checkpoint and its bundle: a contract holds of what is made now."""

from __future__ import annotations

from tests.support.exported import bundle, checkpoint

__all__ = ["bundle", "checkpoint"]
