"""Give the exporter's tests a checkpoint and the bundle that is exported from it here."""

from __future__ import annotations

from tests.support.exported import bundle, checkpoint

__all__ = ["bundle", "checkpoint"]
