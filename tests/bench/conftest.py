"""Give the benchmarks' tests a checkpoint and its bundle."""

from __future__ import annotations

from tests.support.exported import bundle, checkpoint

__all__ = ["bundle", "checkpoint"]
